"""Names on the wire: the records of a message and their keys. Loads nothing, so that a site's process stays small."""

from __future__ import annotations

ADAPTER, ABOUT = "adapter", "about"  # the two records of a message
FLAT = "flat"  # the one array of the adapter record
REFUSED = "refused"  # key of a reply that holds a reason instead of an update
