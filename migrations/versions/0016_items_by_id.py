"""Items are found by their ids alone, in whichever session of a tenant they are.

No release has had the table, so no large one is locked."""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.create_index("ix_items_id", "items", ["item_id"])


def downgrade() -> None:
    op.drop_index("ix_items_id", "items")
