"""What the screens show and may do: QObjects without widgets."""
