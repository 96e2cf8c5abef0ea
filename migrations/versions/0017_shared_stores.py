"""Which shared stores there are, and what an account may have in one. Extents that are in a store go by its id once an
engine has seen it; until then, by its URL, as before."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.create_table(
        "shared_stores",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("seen_us", sa.BigInteger),
    )
    op.add_column("quotas", sa.Column("shared_bytes", sa.BigInteger))
    op.create_index("ix_shared_extents_owner", "shared_extents", ["store", "owner"])


def downgrade() -> None:
    op.drop_index("ix_shared_extents_owner", "shared_extents")
    op.drop_column("quotas", "shared_bytes")
    url = "SELECT url FROM shared_stores WHERE shared_stores.id = shared_extents.store"
    op.execute(f"UPDATE shared_extents SET store = ({url}) WHERE EXISTS ({url})")
    op.drop_table("shared_stores")
