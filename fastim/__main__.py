"""python -m fastim"""

from fastim.cli import main

main()
