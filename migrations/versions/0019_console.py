"""What the console needs: what a key may do, who is signed in, and when a session's newest turn ended.

The role has a constant default, so that no table is rewritten: keys that are there may do what they may today. Turns
that have ended are copied from the leases, which nobody waits for."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("role", sa.Text, nullable=False, server_default="operator"))
    op.create_table(
        "console_sessions",
        sa.Column("secret_hash", sa.LargeBinary, primary_key=True),
        sa.Column("key_id", sa.Text, sa.ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_console_sessions_expiry", "console_sessions", ["expires_us"])
    op.create_table(
        "session_turns",
        sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("turned_us", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO session_turns (session_id, tenant, turned_us) "
        "SELECT sessions.id, sessions.tenant, coalesce(leases.released_us, sessions.updated_us) "
        "FROM sessions LEFT JOIN leases ON leases.session_id = sessions.id WHERE sessions.deleted_us IS NULL"
    )
    # Once it is filled: that is faster, and nobody knows the table yet.
    op.create_index("ix_session_turns_turned", "session_turns", ["tenant", "turned_us", "session_id"])


def downgrade() -> None:
    op.drop_table("session_turns")
    op.drop_table("console_sessions")
    op.drop_column("api_keys", "role")
