"""What is owed: pure functions of the world and the time. Resumed from state alone, so a crash loses nothing."""
