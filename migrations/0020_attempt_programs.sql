-- What computed each attempt at a training. Another worker, of another build or on another device, may go on from a checkpoint, and a manifest
-- names every program that an adapter may be of.
--
-- Only adds: a version from before it runs beside it, and names none.

alter table job_attempts add column program jsonb;
