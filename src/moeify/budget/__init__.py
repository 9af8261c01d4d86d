"""A global budget, in FLOPs, bytes or measured time, spread over layers by what each costs the model.

`curves` is the arithmetic, `price` what a layer costs, `search` finds the allocation.
"""

from .curves import Point as Point
from .curves import spread as spread
from .price import UNITS as UNITS
from .price import Clock as Clock
from .search import AllocateConfig as AllocateConfig
from .search import Allocation as Allocation
from .search import Alternative as Alternative
from .search import allocate as allocate
