"""Which extents are in a shared store, which store an engine uses, and how much of a manifest is in it.

On SQLite the table of manifests is rewritten, so that the keys stay its last column (see 0005). Going back forgets what
is in shared stores: the objects stay there, and nothing finds them."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"

_ORDER = ("session_id", "fingerprint", "rank", "node", "engine_id", "page_size", "tokens", "nbytes", "lost_tokens")


def upgrade() -> None:
    op.create_table(
        "shared_extents",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("store", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("shard", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("writer", sa.Text, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("changed_us", sa.BigInteger, nullable=False),
        sa.Column("used_us", sa.BigInteger, nullable=False),
        sa.Column("doomed_us", sa.BigInteger),
        sa.Column("keys", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("store", "name", name="uq_shared_extents_store"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_shared_extents_changed", "shared_extents", ["store", "fingerprint", "shard", "changed_us"])
    doomed = sa.text("doomed_us IS NOT NULL")
    op.create_index(
        "ix_shared_extents_doomed",
        "shared_extents",
        ["store", "doomed_us"],
        postgresql_where=doomed,
        sqlite_where=doomed,
    )
    op.add_column("engines", sa.Column("shared_store", sa.Text, nullable=False, server_default=sa.text("''")))
    shared = sa.Column("shared_tokens", sa.BigInteger(), nullable=False, server_default="0")
    if op.get_bind().dialect.name == "sqlite":
        reordering = [(*_ORDER, "updated_us", "epoch", "account", "shared_tokens", "keys")]
        with op.batch_alter_table("manifests", recreate="always", partial_reordering=reordering) as table:
            table.add_column(shared)
    else:
        op.add_column("manifests", shared)


def downgrade() -> None:
    with op.batch_alter_table("manifests") as table:
        table.drop_column("shared_tokens")
    op.drop_column("engines", "shared_store")
    op.drop_table("shared_extents")
