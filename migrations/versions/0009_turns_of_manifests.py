"""A manifest says which turn published it and whom its bytes are charged to; a lease, which turns may still publish.

On SQLite the table of manifests is rewritten, so that the keys stay its last column (see 0005). Running sessions go on:
their turns have no tokens until they are resumed, and publish nothing until then."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_ORDER = ("session_id", "fingerprint", "rank", "node", "engine_id", "page_size", "tokens", "nbytes", "lost_tokens")


def upgrade() -> None:
    op.add_column("leases", sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"))
    epoch = sa.Column("epoch", sa.BigInteger(), nullable=False, server_default="0")
    account = sa.Column("account", sa.Text(), nullable=False, server_default=sa.text("''"))
    if op.get_bind().dialect.name == "sqlite":
        reordering = [(*_ORDER, "updated_us", "epoch", "account", "keys")]
        with op.batch_alter_table("manifests", recreate="always", partial_reordering=reordering) as table:
            table.add_column(epoch)
            table.add_column(account)
    else:
        op.add_column("manifests", epoch)
        op.add_column("manifests", account)


def downgrade() -> None:
    with op.batch_alter_table("manifests") as table:
        table.drop_column("account")
        table.drop_column("epoch")
    op.drop_column("leases", "fence")
