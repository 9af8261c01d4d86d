"""The Triton kernels of experts, as `gpu_ffn` calls them. It loads this when needed, and checks what they rely on.

Two ways:

- `union`, few tokens (`triton_union`): neurons stay in their order, programs whose neurons no token of their tile selects exit, rows of
  weights that nobody selects are masked out of the load. Two kernels; sums over neurons by splits, added in order: the same bits again.
- `order_pairs` and what follows, many tokens and training (`triton_plan`, `triton_pairs`, `triton_backward`): (token, group) pairs are
  ordered by group on the device, and the products of a group gather its tokens while they load. What the second product adds up goes to y
  by atomics (thick experts), or through h in the order of the tokens, a dense product and no atomics (thin ones: a pair then writes less
  to h than it would add to y).

No grid depends on a value: nothing waits for the host, and a captured CUDA graph holds for any mask of its shape.
"""

from .triton_backward import hidden_gradients as hidden_gradients
from .triton_backward import weight_gradients as weight_gradients
from .triton_neurons import FUNCTIONS as FUNCTIONS
from .triton_pairs import add_up as add_up
from .triton_pairs import hidden as hidden
from .triton_plan import Ragged as Ragged
from .triton_plan import order_pairs as order_pairs
from .triton_union import union as union
