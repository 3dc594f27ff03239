"""The only place that imports torch: live objects on one side, states of the core's algebra on the other.

Touches: nothing on import; each module's header says what it touches.
"""
