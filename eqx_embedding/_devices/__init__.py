"""What JAX has to be told about devices, derivatives and `jax.vmap`.

- `_primitive.py`: a function that JAX takes as one operation, with a rule for `jax.vmap`.
- `_mesh.py`: the axes of a device mesh, and the arrays that they split.
- `_types.py`: code that knows no devices, run on the parts of arrays that one device has.
- `_collectives.py`: sums and the like over devices, in such code.
- `_gather.py`, `_scatter.py`: the whole of a table whose parts are on several devices, and its
  gradient.
- `_raise.py`: errors at run time, on every device.
"""

from ._collectives import (
    gather_over_devices,
    Group,
    max_over_devices,
    min_over_devices,
    sum_over_devices,
    sum_to_owners,
)
from ._gather import gather, gather_wide
from ._mesh import (
    as_axes,
    as_spec,
    Axes,
    axes_of_type,
    axis_types,
    common,
    count_devices,
    device_kind,
    explicit_axes,
    explicit_sharding,
    find_mesh,
    flat,
    mesh_is_unset,
    remaining,
    reshard,
    sum_over_axes,
    varying_axes,
)
from ._primitive import call_as_one, call_linear, jvp_of_active
from ._raise import raise_unless
from ._types import (
    cast_to_varying,
    device_type,
    DeviceType,
    is_alone,
    load,
    NO_MESH,
    no_mesh,
    save,
    Saved,
    widen,
    without_devices,
)
