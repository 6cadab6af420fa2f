"""How images were made square for the networks in published weights: what files beside them say, as options have it.

timm's ``config.json`` has ``crop_pct``, ``crop_mode`` and ``interpolation``; transformers' ``preprocessor_config.json``
(or ``processor_config.json``) has ``size``, ``crop_size`` and ``resample``; OpenCLIP's ``open_clip_config.json`` has
``preprocess_cfg``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .facts import json_beside, processor_beside

PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # its numbers of filters, as transformers write them
KEEPS_ASPECT = ("CLIP", "Bit", "Siglip2")  # image processors to which one number means the shorter side


def beside(weights: str | Path) -> tuple[dict[str, str], str]:
    """``resize`` (``crop:SHARE`` or ``squash``) and ``resample`` (a filter's name), of these what is said; and where.

    Args:
      weights: a weight file, or the folder that it is in.

    Raises:
      ValueError: a file says what none of these options means, or is damaged.
    """
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    processor, where = processor_beside(folder)
    for name, content, reader in (
        (where, processor, _transformers),
        ("open_clip_config.json", json_beside(folder / "open_clip_config.json"), _open_clip),
        ("config.json", json_beside(folder / "config.json"), _timm),
    ):
        try:
            found = reader(content)
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise ValueError(
                f"{folder / name} says how images are resized in a way that is not known here ({error}): set --resize "
                "and --resample"
            ) from None
        if found:
            return found, name
    return {}, ""


def _transformers(content: dict[str, Any]) -> dict[str, str]:
    if not content.get("do_resize", True) or "size" not in content:
        return {}
    kind, size = str(content.get("image_processor_type", content.get("feature_extractor_type", ""))), content["size"]
    one = isinstance(size, int)
    keeps = kind.startswith(KEEPS_ASPECT) if one else "shortest_edge" in size
    first = _whole(size if one else size["shortest_edge"] if keeps else size["height"])
    last = first
    if content.get("do_center_crop", False) and "crop_size" in content:
        crop = content["crop_size"]
        last = _whole(crop if isinstance(crop, int) else crop["height"])
    told = {"resample": PILLOW[content["resample"]]} if "resample" in content else {}
    return {"resize": _said(keeps, last / first), **told}


def _open_clip(content: dict[str, Any]) -> dict[str, str]:
    own = content.get("preprocess_cfg")
    if not isinstance(own, dict):
        return {}
    modes = {"shortest": "crop:1", "squash": "squash"}
    told = {"resample": _filter(own["interpolation"])} if "interpolation" in own else {}
    return {"resize": modes[own.get("resize_mode", "shortest")], **told}


def _timm(content: dict[str, Any]) -> dict[str, str]:
    own = content.get("pretrained_cfg")
    if not isinstance(own, dict) or "crop_pct" not in own:
        return {}
    keeps = {"center": True, "squash": False}[own.get("crop_mode", "center")]
    told = {"resample": _filter(own["interpolation"])} if "interpolation" in own else {}
    return {"resize": _said(keeps, float(own["crop_pct"])), **told}


def _said(keeps: bool, share: float) -> str:
    if not 0 < share <= 1:
        raise ValueError(f"the part that is cut out is {share:g} of the whole")
    return ("crop" if keeps else "squash") + f":{share:.6g}"


def _filter(name: Any) -> str:
    if name not in PILLOW.values():
        raise ValueError(f"its filter is {name!r}")
    return name


def _whole(size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"a size is {size!r}")
    return size
