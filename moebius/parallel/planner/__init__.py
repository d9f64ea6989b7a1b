"""What a layout will need and how fast it will be, before there is a machine to try it on."""
