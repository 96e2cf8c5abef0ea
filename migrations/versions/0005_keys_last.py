"""The keys of a manifest become its last column. SQLite reads a row up to the last column that is asked for, and
reading the others must not take longer for a longer session. PostgreSQL stores long values apart."""

from alembic import op

revision = "0005"
down_revision = "0004"

_ORDER = ("session_id", "fingerprint", "rank", "node", "engine_id", "page_size", "tokens", "nbytes")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        reordering = [(*_ORDER, "lost_tokens", "updated_us", "keys")]
        with op.batch_alter_table("manifests", recreate="always", partial_reordering=reordering):
            pass


def downgrade() -> None:
    """Does nothing: the order does not matter to earlier versions."""
