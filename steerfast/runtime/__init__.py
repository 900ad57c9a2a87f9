"""Steps, independent of an engine: profiles on a device, the rows that they edit, and the decisions of gates."""
