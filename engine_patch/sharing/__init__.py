"""What a rank and a shared store tell each other: what is stored here is published there, what others have published is
found here, and what nobody needs is deleted.

The catalogue in SQL says what there is (`agentstate.fleet.extents`); `agentstate.fleet.shared_rows` keeps it and the
store together.

=========== ====================================================================================================
`thread`    `Sharing`: the one thread, and the order in which it does all this
`access`    whose the store is, what it answers, and when it is asked again after it has failed
`feed`      what has changed in the catalogue: which extents are found here
`promises`  the sessions whose chains are to be published, and what SQL says of them
`publisher` which extents are published, in which order
`evictions` what somebody may come back for of what the drive is about to evict
`uploads`   extents on their way to the store and into the catalogue
`allowance` how many bytes an account may have there
`deletions` what is erased, and what is collected
`context`   what all of these know of the rank
=========== ====================================================================================================
"""

from engine_patch.sharing.context import SharingStats
from engine_patch.sharing.promises import Publication
from engine_patch.sharing.thread import Sharing

__all__ = ["Publication", "Sharing", "SharingStats"]
