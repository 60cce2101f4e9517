"""Many processes: their ranks, their collectives, and the engines that divide a model among
them."""
