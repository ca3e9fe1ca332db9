"""The published weights of torchvision's networks: found in a folder or the cache, or downloaded.

    python -c "from backbones import file_of; print(file_of('vgg16'))"

They serve the losses of train.py, and detect.py.
"""
from pathlib import Path

import torch

from checkpoints import load_weights
from utils import InputError, RunError, locked


def file_of(name, version="IMAGENET1K_V1"):
    """(URL, file name) of a network's weights; ``version`` is one of torchvision's names, or DEFAULT for the newest."""
    # Imported here, as train.py needs it for some losses only and starts seconds earlier without.
    from torchvision.models import get_model_weights

    url = get_model_weights(name)[version].url
    return url, url.rsplit("/", 1)[1]


def may_be(path, name):
    """Whether a file, whose name begins with the network's, may hold its weights.

    No if torchvision publishes a file of that name, which is then of another version or quantised. No if the name of
    another network fits better: vgg16_bn.pth is not for vgg16.
    """
    from torchvision.models import get_model_weights, list_models

    names = list_models()
    published = {weights.url.rsplit("/", 1)[1] for known in names for weights in get_model_weights(known)}
    longest = max((known for known in names if path.name.startswith(known)), key=len)
    return path.name not in published and longest == name


def find_backbone(name, backbone_dir, version="IMAGENET1K_V1"):
    """Find the weights file of a network of torchvision.

    Looks for torchvision's file name, in ``backbone_dir`` and in torchvision's cache, and then in ``backbone_dir`` for
    any file that ``may_be`` of the network. The file is downloaded only if ``backbone_dir`` is None.

    Args:
        name: of the network, as in ``torchvision.models``.
        backbone_dir: a folder, or None.
        version: as for ``file_of``.

    Returns:
        (path, advice): the path is None where there is no file. The advice belongs into an error about the file: it
        says what was expected, and where.
    """
    url, file_name = file_of(name, version)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if backbone_dir:
        folder = Path(backbone_dir)
        others = sorted(path for path in folder.glob(f"{name}*.pth") if may_be(path, name))
        path = next((path for path in (folder / file_name, cached, *others) if path.is_file()), None)
        part = ", with or without the classifier" if version == "IMAGENET1K_V1" else ""
        return path, (
            f"expected {file_name} from {url} in --backbone_dir {folder}, or there a file {name}*.pth with the same"
            f" weights, not those of another version{part}"
        )
    try:
        if not cached.exists():
            with locked(cached.with_suffix(".lock")):  # of the processes of a machine, one downloads
                if not cached.exists():
                    print(f"downloading {url} to {cached.parent}", flush=True)
                    torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
    except (OSError, RunError, RuntimeError) as error:
        steps = f"download {url} elsewhere, put it into a folder and name that with --backbone_dir"
        return None, f"torchvision's download failed ({error}): {steps}"
    return cached, f"expected {file_name} from {url} in {cached.parent}"


def load_published(net, name, backbone_dir=None, version="IMAGENET1K_V1", use=("{}", "")):
    """Give ``net`` the weights that torchvision publishes for its network ``name``.

    Args:
        net: the network or its first layers, with torchvision's names but for the prefix "features.". The file may
            hold further layers, and its numbers may have any floating type.
        name, backbone_dir, version: as for ``find_backbone``.
        use: two texts for the errors. The first begins the one of a missing file, with {} for ``name``: "{}, the
            backbone of the lpips loss". The second ends each, and says how to do without the network:
            "; --use_lpips False does without it".

    Raises:
        InputError: no such file, or not one of this network.
    """
    path, advice = find_backbone(name, backbone_dir, version)
    subject, way_out = use
    advice += way_out
    if path is None:
        raise InputError(f"{subject.format(name)}: no file; {advice}")
    try:
        state = {key.removeprefix("features."): value for key, value in load_weights(path).items()}
        # Not the integers, which count the batches that a normalisation was trained on.
        wanted = [key for key, value in net.state_dict().items() if value.is_floating_point()]
        net.load_state_dict({key: state[key] for key in wanted}, strict=False)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    except KeyError as error:
        raise InputError(f"{path}: not the weights of {name}, {error.args[0]} is missing; {advice}") from None
    except RuntimeError:
        raise InputError(f"{path}: not the weights of {name}, whose shapes differ; {advice}") from None
