"""The desktop program (PySide6). Of the engine it sees the front door only, never torch."""
