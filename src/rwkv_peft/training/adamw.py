"""AdamW for lean training: averages in 8 bits or in the CPU's memory, parameters in float32 or bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.adam import Averages, Rates, adamw, averages_of, quantisers

if TYPE_CHECKING:
    from ..ops.triton.adam import Table


class LeanAdamW(torch.optim.Optimizer):
    """AdamW as torch's, but for where and in which numbers it keeps things; on a GPU a few launches a step.

    Parameters of float32 and bf16 may be mixed; gradients have the dtype of their parameter. bf16 is computed in
    float32 and rounded at random, so that steps too small for bf16 are taken on average. What is random comes from
    `seed` and the number of the step, which are in the groups and so in `state_dict`: continued from there, steps are
    the same to the bit. A parameter without a gradient is left as it is, while the count of steps goes on.

    If the number `found_inf` on the device is not 0, a step changes nothing, as with torch's AdamW.

    Arguments:
        groups: parameters, or groups of them with `lr` and `weight_decay`.
        bits: of each of the two averages, 32 or 8; small tensors have 32 at all times.
        paged: keep averages in the CPU's pinned memory, where the GPU reads and writes them.
    """

    def __init__(
        self,
        groups: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 32,
        paged: bool = False,
    ) -> None:
        seed = int(torch.randint(2**31, ()))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0, "seed": seed}
        super().__init__(groups, defaults)
        self.paged = paged
        self.first: dict[Tensor, int] = {}  # numbers the values of all parameters
        count = 0
        for p in self.parameters():
            assert p.dtype in (torch.float32, torch.bfloat16)
            p.data = p.data.contiguous()
            self.state[p] = averages_of(p, bits, paged)
            self.first[p] = count
            count += p.numel()
        self.maps = quantisers(p.device)
        self.found_inf = torch.zeros((), device=p.device)
        self.tables: list[list[Table]] = []  # of each group
        self.alone: dict[Tensor, Table] = {}

    def parameters(self) -> Iterator[Tensor]:
        """All, in the order of the groups."""
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters."""
        rates = self.next_rates()
        if self.maps.is_cuda:
            self.tables = self.tables or [self._tables(group["params"]) for group in self.param_groups]
            for tables, rate in zip(self.tables, rates, strict=True):
                for table in tables:
                    table.step(rate, self.maps, self.found_inf)
        else:
            for group, rate in zip(self.param_groups, rates, strict=True):
                for p in group["params"]:
                    self.change(p, rate)

    @torch.no_grad()
    def change(self, p: Tensor, rates: Rates) -> None:
        """Change one parameter alone, if it has a gradient; for those who call `next_rates` themselves."""
        if self.maps.is_cuda:
            if p not in self.alone:
                (self.alone[p],) = self._tables([p])
            self.alone[p].step(rates, self.maps, self.found_inf)
        elif p.grad is not None and not self.found_inf:
            adamw(p, p.grad, self.state[p], rates, self.maps, self.first[p])

    def next_rates(self) -> list[Rates]:
        """Those of each group for the next step, which is counted with this."""
        for group in self.param_groups:
            group["step"] += 1
        names = ("lr", "weight_decay", "betas", "eps", "step", "seed")
        return [Rates.of(*(group[name] for name in names)) for group in self.param_groups]

    def _tables(self, parameters: list[Tensor]) -> list[Table]:
        """One for each kind of tensors among these."""
        from ..ops.triton.adam import Table

        kinds: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, self.state[p]["m"].dtype), []).append(p)
        return [Table(kind, [self.state[p] for p in kind], [self.first[p] for p in kind]) for kind in kinds.values()]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the averages are not copied."""
        self._wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the values of `state_dict`. Raises ConfigError if it is that of other settings or parameters."""
        self._wait()
        own: dict[Tensor, Averages] = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}})  # torch's would give averages the parameters' dtype
        self.state.update(own)
        for i, averages in enumerate(own.values()):
            kept = state_dict["state"].get(i, {})
            if _forms(kept) != _forms(averages):
                raise ConfigError(f"the optimiser's state of parameter {i} has another form; load it with its --optim")
            for name, x in averages.items():
                x.copy_(kept[name])

    def _wait(self) -> None:
        """Until the GPU has written what is in the CPU's memory."""
        if self.paged:
            torch.cuda.synchronize(self.maps.device)


def _forms(averages: Averages) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (x.dtype, x.shape) for name, x in averages.items()}
