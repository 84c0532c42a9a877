"""Sites, their ranks and the coordinator are killed, preempted and paused; the run must end like an undisturbed one."""
