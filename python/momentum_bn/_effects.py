"""What is known of the memory that a call returns: which functions and modules return fresh memory."""

from __future__ import annotations

import enum
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "Kind",
    "describe",
    "is_layer",
    "is_plain_layer",
    "is_quiet",
    "is_untouched",
    "module_kind",
    "returns_tensors",
]

_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Kind(enum.Enum):
    """What a call returns. Everything that is not listed below is UNKNOWN."""

    INPUT = enum.auto()
    """An input or a parameter: memory that others hold."""
    FRESH = enum.auto()
    """A tensor in memory that nobody else has. The arguments are only read, and not kept beyond autograd's needs."""
    SAME = enum.auto()
    """Its first argument itself, perhaps written to."""
    ALIAS = enum.auto()
    """A view of its arguments, or one of them, or a copy, or several of those."""
    METADATA = enum.auto()
    """Numbers that say nothing of the values in a tensor: shapes, dtypes, and what is computed from these."""
    UNKNOWN = enum.auto()
    """Anything. It may keep its arguments, write to them, and return what it kept."""


# Modules that return fresh memory, unless they have an attribute `inplace` that is true.
_FRESH_MODULES = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
}
_ALIAS_MODULES = {
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
}

# Names of functions in torch and of methods of tensors alike.
_FRESH_NAMES = {
    *("abs", "add", "addmm", "amax", "amin", "baddbmm", "bmm", "ceil", "clamp", "clamp_max", "clamp_min", "clone"),
    *("cos", "div", "erf", "exp", "floor", "log", "log_softmax", "logsumexp", "matmul", "maximum", "mean", "minimum"),
    *("mm", "mul", "neg", "pow", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sin", "softmax", "sqrt"),
    *("square", "std", "sub", "sum", "tanh", "true_divide", "var"),
    *("eq", "ge", "gt", "le", "lt", "ne", "isnan", "isfinite", "logical_and", "logical_not", "logical_or"),
}
_FRESH_METHODS = _FRESH_NAMES | {
    *("masked_fill", "new_empty", "new_full", "new_ones", "new_zeros", "norm", "repeat"),
    *("__add__", "__mul__", "__radd__", "__rmul__", "__sub__", "__truediv__"),
}
_FRESH_FUNCTIONS = {
    *(getattr(torch, name) for name in _FRESH_NAMES if hasattr(torch, name)),
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.ones_like, torch.zeros_like),
    *(torch.batch_norm, torch.group_norm, torch.layer_norm, torch.empty_like, torch.rand_like, torch.randn_like),
    *(torch.avg_pool1d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.adaptive_avg_pool1d),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(F.relu, F.relu6, F.leaky_relu, F.prelu, F.elu, F.celu, F.selu, F.silu, F.gelu, F.mish, F.sigmoid, F.tanh),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.logsigmoid, F.softmax, F.log_softmax, F.normalize),
    *(F.batch_norm, F.layer_norm, F.group_norm, F.interpolate, F.upsample, F.pad),
}
# The same on plain numbers: shapes are computed with these.
_OPERATORS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.abs, operator.eq, operator.ne, operator.lt, operator.le, operator.gt),
    *(operator.ge, operator.and_, operator.or_, operator.invert),
}
_FRESH_OPERATORS = (_OPERATORS | {operator.matmul}) - {operator.pos}

_IN_PLACE_NAMES = {
    *("add_", "bernoulli_", "clamp_", "clamp_max_", "clamp_min_", "copy_", "div_", "exp_", "fill_", "masked_fill_"),
    *("mul_", "neg_", "normal_", "relu_", "sigmoid_", "sqrt_", "sub_", "tanh_", "uniform_", "zero_"),
}
_IN_PLACE_FUNCTIONS = {
    *(getattr(torch, name) for name in _IN_PLACE_NAMES if hasattr(torch, name)),
    *(F.elu_, F.hardtanh_, F.leaky_relu_, F.relu_, F.selu_, F.celu_),
}
_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow}

_ALIAS_NAMES = {
    *("chunk", "detach", "flatten", "flip", "moveaxis", "movedim", "narrow", "permute", "reshape"),
    *("roll", "select", "split", "squeeze", "swapaxes", "t", "tensor_split", "topk", "transpose", "unbind"),
    *("unflatten", "unsqueeze"),
}
_ALIAS_METHODS = _ALIAS_NAMES | {
    *("bfloat16", "contiguous", "cpu", "cuda", "double", "expand", "expand_as", "float", "half", "reshape_as", "to"),
    *("type", "type_as", "unfold", "view", "view_as"),
}
_ALIAS_FUNCTIONS = {
    *(getattr(torch, name) for name in _ALIAS_NAMES if hasattr(torch, name)),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
    *(F.unfold, torch.einsum),
}
_RETURN_SEVERAL = {"chunk", "split", "tensor_split", "topk", "unbind"}

_METADATA_METHODS = {
    *("dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "ndimension"),
    *("nelement", "numel", "size", "stride"),
}
_METADATA_ATTRIBUTES = {
    *("device", "dtype", "is_cuda", "is_meta", "itemsize", "layout", "ndim", "nbytes", "requires_grad", "shape"),
}
_ALIAS_ATTRIBUTES = {"H", "T", "data", "mH", "mT"}
_METADATA_FUNCTIONS = {
    *_OPERATORS,
    *_IN_PLACE_OPERATORS,
    *(operator.getitem, operator.index, torch._assert, torch.is_floating_point, torch.numel),
    *(function for function in vars(math).values() if callable(function)),
}

# They need neither their input nor their output again where their other arguments take no gradient: what was known to
# torch's autograd formulas when this was written. Their output may be overwritten with gradients enabled.
_QUIET = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d),
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, F.linear, F.avg_pool2d),
    *(operator.add, operator.sub, torch.add, torch.sub, torch.cat, torch.concat, torch.concatenate),
}


def is_layer(module: nn.Module) -> bool:
    """Whether this is a normalisation of this library, and its forward the library's own."""
    fields = vars(module)
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward.__module__.partition(".")[0] == __package__
        and "activation" in fields
        and "inplace" in fields
    )


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a layer does nothing after it normalised, so that it can do what follows it."""
    return vars(module)["activation"] is None and all(type(child) is nn.Identity for child in module.children())


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    fields = vars(module)
    return "forward" not in fields and not any(_HOOKS(fields))


def describe(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Kind, bool]:
    """What is known of ``node``'s value, and whether it is certainly a tensor.

    Args:
        node: its arguments' ``meta`` has what this function returned for them.
        modules: the network's untouched modules by their names. Of others nothing is known.
    """
    kind = _kind(node, modules)
    if kind is Kind.ALIAS:
        return kind, _is_one_tensor(node)
    if kind is Kind.SAME:
        return kind, _is_tensor(node.args[0])
    return kind, kind in (Kind.INPUT, Kind.FRESH)


def module_kind(module: nn.Module) -> Kind:
    """What a call of this module returns, if it is untouched and its first argument a tensor."""
    kind = type(module)
    if is_layer(module):
        if not all(is_untouched(child) and module_kind(child) is not Kind.UNKNOWN for child in module.children()):
            return Kind.UNKNOWN
        return Kind.SAME if vars(module)["inplace"] else Kind.FRESH
    if kind is nn.Identity:
        return Kind.SAME
    if kind in _ALIAS_MODULES:
        return Kind.ALIAS
    if kind not in _FRESH_MODULES or getattr(module, "return_indices", False):
        return Kind.UNKNOWN
    return Kind.SAME if getattr(module, "inplace", False) else Kind.FRESH


def is_quiet(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether autograd will not need the value of this node for its own operation."""
    return (type(modules.get(str(node.target))) if node.op == "call_module" else node.target) in _QUIET


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Kind:
    if node.op in ("placeholder", "get_attr"):
        return Kind.INPUT
    if node.op == "call_module":
        module = modules.get(str(node.target))
        # What is known are modules that fail unless they are called with a tensor, and Identity.
        return Kind.UNKNOWN if module is None or not _is_called_with_value(node) else module_kind(module)
    if node.op == "call_method":
        return _kind_of_method(node)
    if node.op == "call_function":
        return _kind_of_function(node)
    return Kind.UNKNOWN


def _kind_of_method(node: fx.Node) -> Kind:
    name = str(node.target)
    if not node.args or not _is_tensor(node.args[0]):
        return Kind.UNKNOWN
    if name in _METADATA_METHODS:
        return Kind.METADATA
    if "out" in node.kwargs:
        return Kind.UNKNOWN
    if name in _FRESH_METHODS:
        return Kind.FRESH
    if name in _IN_PLACE_NAMES:
        return Kind.SAME
    return Kind.ALIAS if name in _ALIAS_METHODS else Kind.UNKNOWN


def _kind_of_function(node: fx.Node) -> Kind:
    function, args = node.target, node.args
    if function is getattr and _is_tensor(args[0]):
        if args[1] in _METADATA_ATTRIBUTES:
            return Kind.METADATA
        return Kind.ALIAS if args[1] in _ALIAS_ATTRIBUTES else Kind.UNKNOWN
    if function in _METADATA_FUNCTIONS and all(_is_metadata(argument) for argument in node.all_input_nodes):
        return Kind.METADATA
    if "out" in node.kwargs:
        return Kind.UNKNOWN
    if function in _FRESH_OPERATORS:
        # Of a list and a list they make a list.
        return Kind.FRESH if any(map(_is_tensor, args)) else Kind.UNKNOWN
    if function is operator.getitem:
        return Kind.ALIAS if _is_known(args[0]) else Kind.UNKNOWN
    if function in _IN_PLACE_OPERATORS:
        return Kind.SAME if _is_tensor(args[0]) else Kind.UNKNOWN
    if function in _FRESH_FUNCTIONS:
        if not _inplace_argument(node):
            return Kind.FRESH
        return Kind.SAME if _is_called_with_value(node) else Kind.UNKNOWN
    if function in _IN_PLACE_FUNCTIONS and _is_called_with_value(node):
        return Kind.SAME
    if function in _ALIAS_FUNCTIONS:
        return Kind.ALIAS
    return Kind.UNKNOWN


# Where functions of torch.nn.functional that can work in place take their argument of that name.
_INPLACE_POSITION: dict[Any, int] = {
    **dict.fromkeys((F.relu, F.relu6, F.selu, F.silu, F.mish, F.hardswish, F.hardsigmoid), 1),
    **dict.fromkeys((F.leaky_relu, F.elu, F.celu), 2),
    F.hardtanh: 3,
}


def _inplace_argument(node: fx.Node) -> bool:
    """Whether the call may work in place."""
    position = _INPLACE_POSITION.get(node.target)
    if position is None:
        return False
    if len(node.args) > position:
        return node.args[position] is not False
    return node.kwargs.get("inplace", False) is not False


def _is_called_with_value(node: fx.Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], fx.Node)


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and bool(argument.meta["is_tensor"])


def _is_metadata(node: fx.Node) -> bool:
    return node.meta["kind"] is Kind.METADATA


def _is_known(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta["kind"] is not Kind.UNKNOWN


def _is_one_tensor(node: fx.Node) -> bool:
    """Whether a node of kind ALIAS returns one tensor, not several."""
    first = node.args[0] if node.args else None
    if node.target is operator.getitem and not _is_tensor(first):
        return isinstance(node.args[1], int) and isinstance(first, fx.Node) and returns_tensors(first)
    return _is_tensor(first) and not returns_tensors(node)


def returns_tensors(node: fx.Node) -> bool:
    """Whether the value is certainly a tuple of tensors."""
    first = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return isinstance(node.args[1], slice) and isinstance(first, fx.Node) and returns_tensors(first)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _RETURN_SEVERAL and _is_tensor(first)
