"""What hangs together: units of channels, heads and neurons that can only be removed from all parameters at once."""

from labkit.pruning.coupling.groups import Coupling, Group, Member, arguments, trace

__all__ = ["Coupling", "Group", "Member", "arguments", "trace"]
