"""Operations in C++ for CPUs: what torch does in several passes over rows, or in small products."""
