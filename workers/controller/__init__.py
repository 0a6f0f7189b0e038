"""The controller process: answers commands, runs the sagas, projects the views. Several may run; one leads."""
