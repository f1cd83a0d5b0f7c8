"""The Bus over Apache Kafka: one implementation of fastim.bus.base.Bus between processes.

bus      KafkaBus: topics, publish, readers, lag; what the rest of fastim sees
writer   one lane per partition: batches, acknowledgement, and what becomes of them when a broker is away
reader   one member of a group: positions, settling, commits, partitions that come and go
clerk    questions about topics and offsets, and how a connection is secured
"""

from fastim.bus.kafka.bus import KafkaBus
from fastim.bus.kafka.clerk import KafkaSecurity
from fastim.bus.kafka.reader import Gap

__all__ = ["Gap", "KafkaBus", "KafkaSecurity"]
