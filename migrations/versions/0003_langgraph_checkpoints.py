"""LangGraph's checkpoints: checkpoints, their channels' values, the items of long lists, pending writes."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "checkpoints",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("id", bytewise, nullable=False),
        sa.Column("parent_id", sa.Text),
        sa.Column("run_id", sa.Text),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.Column("encoding", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "namespace", "id", name="pk_checkpoints"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_checkpoints_session_id", ondelete="CASCADE"),
    )
    op.create_index("ix_checkpoints_run_id", "checkpoints", ["run_id"])
    op.create_table(
        "checkpoint_channels",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("encoding", sa.Text),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "namespace", "channel", "version", name="pk_checkpoint_channels"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_checkpoint_channels_session_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "checkpoint_blobs",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "digest", name="pk_checkpoint_blobs"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_checkpoint_blobs_session_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "checkpoint_writes",
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("checkpoint_id", sa.Text, nullable=False),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("task_path", sa.Text, nullable=False),
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("encoding", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint(
            "session_id", "namespace", "checkpoint_id", "task_id", "position", name="pk_checkpoint_writes"
        ),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_checkpoint_writes_session_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    for table in ("checkpoint_writes", "checkpoint_blobs", "checkpoint_channels", "checkpoints"):
        op.drop_table(table)
