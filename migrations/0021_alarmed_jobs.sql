-- Alarms are counted for the operator's monitoring: few jobs of many raise one.
--
-- Only adds: a version from before it runs beside it.

create index jobs_alarmed on jobs (alarmed_at) where alarmed_at is not null;
