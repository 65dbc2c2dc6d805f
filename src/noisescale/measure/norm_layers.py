"""Which parameters belong to normalisation layers: a cheap part to measure."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.measure.compiled import plain, plain_name

NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def norm_layers(
    model: nn.Module, *, kinds: tuple[type[nn.Module], ...] = NORM_LAYERS
) -> Callable[[str], bool]:
    """Return whether a name is that of a normalisation layer's own parameter.

    For ``NoiseMeter(model, optimizer, parameters=norm_layers(model))``: only these layers are
    hooked then. Their noise scale is another number than the whole model's, which it follows
    along a training in the source below; how well, ``benchmarks/layernorm_only.py`` measures.

    Args:
        model: the model.
        kinds: classes of the layers.

    Raises:
        InvalidInputError: the model has no such layer with parameters.

    Source: Gray et al. 2024, "Normalization layer per-example gradients are sufficient to
    predict gradient noise scale in transformers".

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> [name for name, _ in model.named_parameters() if norm_layers(model)(name)]
    ['1.weight', '1.bias']
    """
    names = {
        plain_name(f"{prefix}.{key}" if prefix else key)
        for prefix, module in plain(model).named_modules()
        if isinstance(module, kinds)
        for key, _ in module.named_parameters(recurse=False)
    }
    if not names:
        raise InvalidInputError(
            f"model {type(model).__name__}",
            f"a layer among {', '.join(kind.__name__ for kind in kinds)} is required",
            "name the model's own normalisation classes with kinds=",
        )
    return names.__contains__
