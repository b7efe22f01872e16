"""Running a recorded network part by part: regions, local forms of operators, sweeps."""
