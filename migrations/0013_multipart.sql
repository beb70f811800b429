-- An object that is written to a remote store in parts: what the store calls that upload, so that the sweeper can abort one whose
-- process was killed.

alter table staged_objects add column multipart_id text;
