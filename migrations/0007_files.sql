-- Files that are kept although some of their lines are bad, that expire, and that came in parts.

alter table files add column status text not null default 'processed' check (status in ('processed', 'error'));
-- Of a file with bad lines: {"count": …, "lines": [{"line", "path", "message"}, …]}.
alter table files add column errors jsonb;
alter table files add constraint files_error_says_why check (status <> 'error' or errors is not null);
alter table files drop constraint files_row_count_check;
alter table files add constraint files_row_count_check check (row_count >= 0);
alter table files add column expires_at timestamptz;
create index files_expires_at on files (expires_at) where expires_at is not null;
-- The file is what these hold one behind the other; its hash is over all of it.
alter table files add column object_keys text[];
update files set object_keys = array[object_key];
alter table files alter column object_keys set not null;
alter table files add constraint files_has_bytes check (cardinality(object_keys) > 0);
alter table files drop column object_key;

create index files_bytes_by_project on files (project_id) include (bytes);

create table uploads (
    id uuid primary key,
    project_id uuid not null references projects (id),
    filename text not null,
    purpose text not null,
    mime_type text not null,
    -- What the parts must come to.
    bytes bigint not null check (bytes > 0),
    status text not null check (status in ('pending', 'completed', 'cancelled')),
    -- Of the file it becomes.
    file_id uuid,
    file_lifetime_seconds bigint check (file_lifetime_seconds > 0),
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    constraint uploads_completed_has_file check ((status = 'completed') = (file_id is not null))
);
create index uploads_by_project on uploads (project_id, id);
create index uploads_pending on uploads (expires_at) where status = 'pending';

create table upload_parts (
    id uuid primary key,
    upload_id uuid not null references uploads (id),
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    created_at timestamptz not null default now()
);
create index upload_parts_by_upload on upload_parts (upload_id);
