"""The rollout controller: moves published checkpoints through standby to live, and back.

Deliberately does not know how a version is loaded or served; it reads statuses and writes the deployment record.
"""
