"""What is to be erased from page directories. These are tables of their own, so that no table is rewritten: the heads
of the manifests that are there are read from them, a few at a time.

Going back forgets what waits to be erased: those pages are evicted as the oldest."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_AT_ONCE = 500
_KEY_BYTES, _HEAD_PAGES, _DIGITS = 32, 128, 4


def upgrade() -> None:
    heads = op.create_table(
        "manifest_heads",
        *_owner(primary_key=True),
        sa.Column("head", sa.LargeBinary, nullable=False),
    )
    _fill(heads)
    op.create_index("ix_manifest_heads_head", "manifest_heads", ["fingerprint", "rank", "node", "head"])
    op.create_table(
        "abandoned_pages",
        *_owner(primary_key=True),
        sa.Column("last_key", sa.LargeBinary, primary_key=True),
        sa.Column("first_page", sa.Integer, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.Column("abandoned_us", sa.BigInteger, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "erasures",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        *_owner(nullable=False),
        sa.Column("first_page", sa.Integer, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_erasures_store", "erasures", ["fingerprint", "rank", "node", "id"])


def downgrade() -> None:
    for table in ("erasures", "abandoned_pages", "manifest_heads"):
        op.drop_table(table)


def _owner(**options: bool) -> list[sa.Column]:
    return [
        sa.Column("session_id", sa.Text, **options),
        sa.Column("fingerprint", sa.Text, **options),
        sa.Column("rank", sa.Integer, autoincrement=False, **options),
        sa.Column("node", sa.Text, **options),
    ]


def _fill(heads: sa.Table) -> None:
    """As `agentstate.fleet.erasures.head_of` makes them."""
    names = ("session_id", "fingerprint", "rank", "node")
    manifests = sa.table("manifests", *(sa.column(name) for name in (*names, "keys")))
    key = sa.tuple_(*(manifests.c[name] for name in names))
    beginning = sa.func.substr(manifests.c["keys"], 1, _KEY_BYTES * _HEAD_PAGES, type_=sa.LargeBinary)
    found = sa.select(*(manifests.c[name] for name in names), beginning.label("beginning"))
    found = found.order_by(*(manifests.c[name] for name in names)).limit(_AT_ONCE)
    after = None
    while True:
        query = found if after is None else found.where(key > sa.tuple_(*map(sa.literal, after)))
        rows = op.get_bind().execute(query).all()
        if rows:
            op.get_bind().execute(sa.insert(heads), [_head(row) for row in rows])
            after = tuple(rows[-1])[: len(names)]
        if len(rows) < _AT_ONCE:
            return


def _head(row: sa.Row) -> dict[str, object]:
    # To SQLite, the beginning of nothing is null.
    keys = bytes(row.beginning or b"")
    head = b"".join(keys[at : at + _DIGITS] for at in range(0, len(keys), _KEY_BYTES))
    return {**{name: value for name, value in row._mapping.items() if name != "beginning"}, "head": head}
