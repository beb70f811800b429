//! Base models: a set of objects under their content's hash, and a name.

use std::path::Path;

use holdfast_domain::{Invalid, model_name};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::files::object_ref;
use crate::objects::{self, ObjectRef, keys};
use crate::{Store, StoreError, new_id};

/// A base model's row.
#[derive(Debug, Clone)]
pub struct BaseModel {
    pub(crate) id: Uuid,
    /// The name tenants ask for.
    pub name: String,
    /// Numbers in all its tensors.
    pub parameter_count: u64,
    /// The most tokens it can see at once; unknown of models imported by early versions.
    pub context_length: Option<u32>,
    /// When it was imported.
    pub created_at: OffsetDateTime,
}

/// What an import learned of a model beside its files.
#[derive(Debug, Clone, Copy)]
pub struct BaseModelFacts {
    /// Numbers in all its tensors.
    pub parameter_count: u64,
    /// The most tokens it can see at once.
    pub context_length: u32,
}

struct Row {
    id: Uuid,
    name: String,
    parameter_count: i64,
    context_length: Option<i64>,
    created_at: OffsetDateTime,
}

impl From<Row> for BaseModel {
    fn from(row: Row) -> Self {
        let Row { id, name, parameter_count, context_length, created_at } = row;
        let context_length = context_length.and_then(|tokens| u32::try_from(tokens).ok());
        Self { id, name, parameter_count: parameter_count.unsigned_abs(), context_length, created_at }
    }
}

/// A base model's files, by name, and the hash over all of them.
#[derive(Debug, Clone)]
pub struct BaseModelFiles {
    /// SHA-256 over names and hashes: the same content is the same model, whatever it is called.
    pub content_sha256: [u8; 32],
    /// Name and object.
    pub files: Vec<(String, ObjectRef)>,
}

impl Store {
    /// Keeps the files of a canonical folder as the base model `name`. The same content under the same name is no change.
    ///
    /// # Errors
    /// When the name is taken by another content or cannot be used, the folder cannot be read, or a store fails.
    pub async fn create_base_model(&self, name: &str, folder: &Path, facts: BaseModelFacts) -> Result<BaseModel, StoreError> {
        model_name::check(name)?;
        let mut files = Vec::new();
        let mut entries = tokio::fs::read_dir(folder).await?;
        while let Some(entry) = entries.next_entry().await? {
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let sha256 = hash_file(entry.path()).await?;
            files.push((file_name, entry.path(), sha256));
        }
        files.sort();
        let mut content = Sha256::new();
        for (file_name, _, sha256) in &files {
            content.update(file_name.as_bytes());
            content.update([0]);
            content.update(sha256);
        }
        let content: [u8; 32] = content.finalize().into();

        let existing =
            sqlx::query!("select content_sha256 from base_models where name = $1", name).fetch_optional(&self.pool).await?;
        if let Some(existing) = existing {
            if existing.content_sha256 == content {
                return self.base_model(name).await;
            }
            return Err(name_taken(name));
        }
        // The same content under another name shares its objects, which a row already claims.
        let shared = self.base_model_files_by_content(&content).await?;
        let (objects, staged) = if shared.is_empty() {
            let mut written = Vec::new();
            for (file_name, path, _) in &files {
                let object = self.objects.stage_file(keys::base_model(&content, file_name), path).await?;
                written.push((file_name.clone(), object));
            }
            let keys: Vec<String> = written.iter().map(|(_, object)| object.key.clone()).collect();
            (written, keys)
        } else {
            (shared, Vec::new())
        };

        let mut transaction = self.pool.begin().await?;
        objects::claim(&mut transaction, &staged).await?;
        let id = new_id();
        let inserted = sqlx::query!(
            "insert into base_models (id, name, content_sha256, parameter_count, context_length) values ($1, $2, $3, $4, $5)",
            id,
            name,
            &content[..],
            facts.parameter_count.cast_signed(),
            i64::from(facts.context_length)
        )
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::from);
        match inserted {
            Err(error) if error.constraint() == Some("base_models_name_unique") => return Err(name_taken(name)),
            other => other?,
        };
        for (file_name, object) in &objects {
            sqlx::query!(
                "insert into base_model_files (base_model_id, name, object_key, bytes, sha256) values ($1, $2, $3, $4, $5)",
                id,
                file_name,
                object.key,
                object.bytes.cast_signed(),
                &object.sha256[..]
            )
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        self.base_model(name).await
    }

    /// One base model.
    ///
    /// # Errors
    /// When there is none of this name, or the database fails.
    pub async fn base_model(&self, name: &str) -> Result<BaseModel, StoreError> {
        let row = sqlx::query_as!(
            Row,
            "select id, name, parameter_count, context_length, created_at from base_models where name = $1",
            name
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(BaseModel::from).ok_or(StoreError::NotFound)
    }

    /// All base models, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn base_models(&self) -> Result<Vec<BaseModel>, StoreError> {
        let rows =
            sqlx::query_as!(Row, "select id, name, parameter_count, context_length, created_at from base_models order by name")
                .fetch_all(&self.pool)
                .await?;
        Ok(rows.into_iter().map(BaseModel::from).collect())
    }

    /// Where a base model's files are.
    ///
    /// # Errors
    /// When there is none of this name, or the database fails.
    pub async fn base_model_files(&self, name: &str) -> Result<BaseModelFiles, StoreError> {
        let row = sqlx::query!("select content_sha256 from base_models where name = $1", name)
            .fetch_optional(&self.pool)
            .await?
            .ok_or(StoreError::NotFound)?;
        let content = row
            .content_sha256
            .as_slice()
            .try_into()
            .map_err(|_| StoreError::Corrupt(format!("the hash of base model {name}")))?;
        Ok(BaseModelFiles { content_sha256: content, files: self.base_model_files_by_content(&content).await? })
    }

    async fn base_model_files_by_content(&self, content: &[u8; 32]) -> Result<Vec<(String, ObjectRef)>, StoreError> {
        let rows = sqlx::query!(
            "select distinct f.name, f.object_key, f.bytes, f.sha256
             from base_model_files f join base_models m on m.id = f.base_model_id where m.content_sha256 = $1 order by f.name",
            &content[..]
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(|r| Ok((r.name, object_ref(r.object_key, r.bytes, &r.sha256)?))).collect()
    }
}

fn name_taken(name: &str) -> StoreError {
    Invalid::new("name", "name_taken", format!("there is another base model of the name {name}; choose another name")).into()
}

async fn hash_file(path: std::path::PathBuf) -> Result<[u8; 32], StoreError> {
    let hashed = tokio::task::spawn_blocking(move || {
        let (mut file, mut hash) = (std::fs::File::open(path)?, Sha256::new());
        let mut buffer = vec![0; 1024 * 1024];
        loop {
            match std::io::Read::read(&mut file, &mut buffer)? {
                0 => return Ok::<_, std::io::Error>(hash.finalize().into()),
                read => hash.update(&buffer[..read]),
            }
        }
    });
    Ok(hashed.await.map_err(std::io::Error::other)??)
}
