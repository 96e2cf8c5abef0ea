"""SGLang's own subscriber of KV events, in a process of its own. Prints what it receives, an event a line.

It reports to a cache master, of which this has a stand-in: nobody looks at what that is told.
"""

from __future__ import annotations

import json
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any


def main(endpoint: str) -> None:
    umbp: Any = ModuleType("mori.umbp")
    umbp.UMBPTierType = SimpleNamespace(HBM="HBM", DRAM="DRAM")
    mori: Any = ModuleType("mori")
    mori.umbp = umbp
    sys.modules |= {"mori": mori, "mori.umbp": umbp}

    import msgspec
    from sglang.srt.mem_cache.storage.umbp.umbp_store import KVEventsSubscriber

    class Printing(KVEventsSubscriber):  # type: ignore[misc]
        def on_event(self, event: Any, batch_ts: float, attn_dp_rank: int | None) -> None:
            super().on_event(event, batch_ts, attn_dp_rank)
            print(json.dumps({"type": type(event).__name__, **msgspec.structs.asdict(event)}), flush=True)

    def taken(*arguments: object) -> bool:
        return True

    client = SimpleNamespace(
        report_external_kv_blocks=taken,
        revoke_external_kv_blocks=taken,
        revoke_all_external_kv_blocks_at_tier=taken,
    )
    Printing(client, endpoint).start()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1])
