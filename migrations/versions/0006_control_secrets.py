"""The secret that each engine's control endpoint answers to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("engines", sa.Column("control_secret", sa.Text))


def downgrade() -> None:
    op.drop_column("engines", "control_secret")
