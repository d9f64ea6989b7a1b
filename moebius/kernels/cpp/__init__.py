"""Operations in C++ for CPUs: passes over rows that torch makes one after the other, in one."""
