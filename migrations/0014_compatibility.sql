-- Which programs this schema still takes. A program starts on a schema newer than the one it was built with as long as its own newest
-- migration is not below this; a migration that takes away what an older program needs raises it.

create table schema_compatibility (
    is_only_row boolean primary key default true check (is_only_row),
    oldest_schema bigint not null
);
insert into schema_compatibility (oldest_schema) values (14);
