-- Things whose bytes are in the object store: a row names its object's key.

-- An object is listed here before it is written, and taken off in the transaction that gives it a row. What stays is what
-- no row claims; a sweeper removes it after a grace time.
create table staged_objects (
    key text primary key,
    staged_at timestamptz not null default now()
);
create index staged_objects_staged_at on staged_objects (staged_at);

create table files (
    id uuid primary key,
    project_id uuid not null references projects (id),
    filename text not null,
    purpose text not null check (purpose in ('fine-tune', 'fine-tune-results')),
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    object_key text not null unique,
    -- A file whose shape is wrong is refused while it is uploaded, so every row here has been checked.
    row_count bigint not null check (row_count > 0),
    created_at timestamptz not null default now()
);
-- Lists are by project, newest first; ids grow with time.
create index files_by_project on files (project_id, id);

create table base_models (
    id uuid primary key,
    name text not null constraint base_models_name_unique unique,
    -- SHA-256 over the names and hashes of its files: what the model is, whatever it is called.
    content_sha256 bytea not null check (octet_length(content_sha256) = 32),
    parameter_count bigint not null check (parameter_count > 0),
    created_at timestamptz not null default now()
);

create table base_model_files (
    base_model_id uuid not null references base_models (id),
    name text not null,
    object_key text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (base_model_id, name)
);

-- Requests and refusals that training holds a model to. A version never changes: a new import makes the next one.
create table alignment_sets (
    id uuid primary key,
    name text not null,
    version integer not null check (version > 0),
    object_key text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    row_count bigint not null check (row_count > 0),
    created_at timestamptz not null default now(),
    constraint alignment_sets_version_unique unique (name, version)
);
