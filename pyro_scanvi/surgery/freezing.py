"""Which entries of a grown model may move, how the others are held, and the proof that they were.

Tensors that are frozen whole have no gradient, so no optimiser sees them. Tensors of which some
entries move, such as the column of a new batch, are put right after each step of the optimiser:
their frozen entries are written back bit by bit, whatever weight decay or momentum did to them.
(scvi-tools zeroes their gradients, and weight decay shrinks them all the same.) Frozen batch norms
are in eval mode whenever they are called, so that neither statistics nor weights move.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_scanvi.model.networks import NormalNetwork
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.surgery.growing import placements
from pyro_scanvi.validation import InputError, check_flags, make_plain


@dataclass(frozen=True)
class Freeze:
    """What of a grown model may move.

    Attributes
    ----------
    new
        For each tensor that grew [its axis, the positions of new categories on it], as JSON holds
        it, and so on for further axes: these entries always move.
    unfrozen
        Everything moves; the other flags are not read.
    freeze_dropout, freeze_expression, freeze_decoder_first_layer, freeze_batchnorm_encoder, \
freeze_batchnorm_decoder, freeze_classifier
        See :meth:`pyro_scanvi.SCANVI.load_query_data`.
    """

    new: Mapping[str, list]
    unfrozen: bool = False
    freeze_dropout: bool = False
    freeze_expression: bool = True
    freeze_decoder_first_layer: bool = True
    freeze_batchnorm_encoder: bool = True
    freeze_batchnorm_decoder: bool = False
    freeze_classifier: bool = True

    @property
    def keeps_latent(self) -> bool:
        """Whether cells of old batches keep their latent state, whatever is trained."""
        held = self.freeze_expression and self.freeze_batchnorm_encoder
        return held and not self.unfrozen

    def __post_init__(self):
        make_plain(self)
        check_flags(**{name: flag for name, flag in asdict(self).items() if name != "new"})


def frozen(reference: SCANVAE, vae: SCANVAE, **flags: bool) -> Freeze:
    """The freeze of `vae`, which grew out of `reference`; it is put into force."""
    places = placements(reference, vae)
    new = {
        name: [part for place in axes for part in (place.dim, list(place.new))]
        for name, axes in places.items()
    }
    freeze = Freeze(new=new, **flags)
    hold(vae, freeze)
    return freeze


def hold(vae: SCANVAE, freeze: Freeze) -> None:
    """Take the gradients from what is frozen whole, and hold batch norms and dropout still."""
    masks = trainable(vae, freeze)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(bool(masks[name].any()))
    for module in _held(vae, freeze):
        module.register_forward_pre_hook(_evaluate)


def trainable(vae: SCANVAE, freeze: Freeze | None) -> dict[str, Tensor]:
    """Whether each entry of the state dict may move in training; None is an unfrozen model."""
    moving = set(vae.modules()) if freeze is None or freeze.unfrozen else _thawed(vae, freeze)
    owners = dict(vae.named_modules(remove_duplicate=False))  # a state dict has all names
    parameters = dict(vae.named_parameters(remove_duplicate=False))
    masks = {}
    for name, tensor in vae.state_dict().items():
        owner = owners[name.rpartition(".")[0]]
        learned = name in parameters or isinstance(owner, _BatchNorm)
        masks[name] = torch.full(tensor.shape, learned and owner in moving)
        if freeze is not None and name in freeze.new and name in parameters:
            _mark(masks[name], freeze.new[name])
    return masks


class KeepFrozen(Callback):
    """Writes the frozen entries of tensors back after each step of the optimiser.

    Parameters
    ----------
    vae
        The model that is trained.
    freeze
        What may move.
    """

    def __init__(self, vae: SCANVAE, freeze: Freeze):
        parameters, masks = dict(vae.named_parameters()), trainable(vae, freeze)
        self.partly = [
            (p, masks[name])
            for name, p in parameters.items()
            if masks[name].any() and not masks[name].all()
        ]
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Take down the frozen entries, on the device where they are trained."""
        self.kept = [(p, mask.to(p.device), p.detach().clone()) for p, mask in self.partly]

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Write them back."""
        self.enforce()

    def on_exception(self, *arguments: Any) -> None:
        """Write them back too where a step was interrupted."""
        self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Frozen entries as they were when training started, to the bit."""
        for parameter, mask, before in self.kept:
            parameter.copy_(torch.where(mask, parameter, before))


def callbacks(vae: SCANVAE, freeze: Freeze | None) -> list[Callback]:
    """Callbacks that keep the freeze in training; InputError if nothing is left to train."""
    if freeze is None or freeze.unfrozen:
        return []
    if not any(p.requires_grad for p in vae.parameters()):
        raise InputError(
            "everything is frozen and the query has no new category: there is nothing to train; "
            "predict right away, or load_query_data with a freeze_... flag set to False"
        )
    return [KeepFrozen(vae, freeze)]


def state_diff(vae: SCANVAE, reference: SCANVAE, freeze: Freeze | None) -> Iterator[dict[str, Any]]:
    """One row for each tensor of the state dict; see :meth:`pyro_scanvi.SCANVI.state_diff`."""
    places, masks = placements(reference, vae), trainable(vae, freeze)
    before = reference.state_dict()
    for name, tensor in vae.state_dict().items():
        old, new = before[name], torch.zeros(tensor.shape, dtype=torch.bool)
        for place in places.get(name, ()):
            old = place.spread(old)
            _mark(new, [place.dim, list(place.new)])
        tensor, old = tensor.detach().cpu(), old.detach().cpu()
        change = torch.where(new, 0.0, (tensor.double() - old.double()).abs())
        yield {
            "name": name,
            "entries": tensor.numel(),
            "new": int(new.sum()),
            "trainable": int(masks[name].sum()),
            "changed": int((_bits_differ(tensor, old) & ~new).sum()),
            "max_change": change.max().item() if tensor.numel() else 0.0,
        }


def _mark(mask: Tensor, new: list) -> None:
    """Put True at the positions of new categories, [axis, positions, axis, positions, ...]."""
    for dim, positions in zip(new[::2], new[1::2], strict=True):
        mask.index_fill_(dim, torch.tensor(positions, dtype=torch.long), True)


def _bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether any bit of each entry differs; 0 and -0 do, a NaN and the same NaN do not."""
    bytes_of = [t.reshape(-1, 1).contiguous().view(torch.uint8) for t in (a, b.to(a.dtype))]
    return (bytes_of[0] != bytes_of[1]).any(-1).reshape(a.shape)


def _encoders_of_counts(vae: SCANVAE) -> list[NormalNetwork]:
    return [vae.z_encoder, vae.l_encoder] if vae.latent_library else [vae.z_encoder]


def _batch_norms(*networks: nn.Module) -> list[nn.Module]:
    return [m for network in networks for m in network.modules() if isinstance(m, _BatchNorm)]


THAWED_BY: dict[str, Callable[[SCANVAE], list[nn.Module]]] = {  # when the flag is False
    "freeze_expression": lambda vae: [
        layer for encoder in _encoders_of_counts(vae) for layer in encoder.input_layers()
    ],
    "freeze_decoder_first_layer": lambda vae: vae.x_decoder.input_layers(),
    "freeze_batchnorm_encoder": lambda vae: _batch_norms(*_encoders_of_counts(vae), vae.u_encoder),
    "freeze_batchnorm_decoder": lambda vae: _batch_norms(vae.x_decoder, vae.z_decoder),
    "freeze_classifier": lambda vae: list(vae.classifier.modules()),
}


def _thawed(vae: SCANVAE, freeze: Freeze) -> set[nn.Module]:
    """Modules whose own parameters and statistics move whole."""
    parts = [modules(vae) for flag, modules in THAWED_BY.items() if not getattr(freeze, flag)]
    return {module for part in parts for module in part}


def _held(vae: SCANVAE, freeze: Freeze) -> list[nn.Module]:
    """Modules that are in eval mode in training too."""
    if freeze.unfrozen:
        return []
    moving = _thawed(vae, freeze)
    norms = [m for m in _batch_norms(vae) if m not in moving]
    dropouts: list[nn.Module] = [m for m in vae.modules() if isinstance(m, nn.Dropout)]
    return norms + (dropouts if freeze.freeze_dropout else [])


def _evaluate(module: nn.Module, inputs: Any) -> None:
    module.eval()
