//! A rank's position in a group and its sub-groups, the same for every engine: which group it is, who is in
//! it, and how a sub-group is named without asking the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::CommError;

/// Which group: its members by world rank, the group that it was made from, and the how-manieth group of
/// these members that one made.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupId {
    pub(super) members: Vec<usize>,
    parent: Option<Arc<GroupId>>,
    number: u64,
}

impl GroupId {
    /// The group of all ranks.
    pub(super) fn world(ranks: usize) -> Arc<Self> {
        Arc::new(Self {
            members: (0..ranks).collect(),
            parent: None,
            number: 0,
        })
    }
}

/// A rank's position in a group.
#[derive(Debug)]
pub(super) struct Position {
    pub(super) id: Arc<GroupId>,
    pub(super) rank: usize,
    /// How many sub-groups of the same members were made: all members count alike.
    made: Mutex<HashMap<Vec<usize>, u64>>,
}

impl Position {
    pub(super) fn new(id: Arc<GroupId>, rank: usize) -> Self {
        Self {
            id,
            rank,
            made: Mutex::default(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.id.members.len()
    }

    pub(super) fn world_rank(&self) -> usize {
        self.id.members[self.rank]
    }

    /// This rank's position in the sub-group of `members`, ranks of this group.
    ///
    /// # Errors
    /// [`CommError::Members`] if this rank is not a member, or the list is not one of distinct ranks.
    pub(super) fn subgroup(&self, members: &[usize]) -> Result<Self, CommError> {
        let refuse = |rule: &'static str| CommError::Members {
            rank: self.rank,
            size: self.size(),
            members: members.to_vec(),
            rule: rule.into(),
        };
        if members.iter().any(|&member| member >= self.size()) {
            return Err(refuse("each member must be a rank of the group"));
        }
        let mut sorted = members.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != members.len() {
            return Err(refuse("each member may be named once"));
        }
        let Some(rank) = members.iter().position(|&member| member == self.rank) else {
            return Err(refuse("the rank that asks must be a member"));
        };
        let world_ranks: Vec<_> = (members.iter())
            .map(|&member| self.id.members[member])
            .collect();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let count = made.entry(world_ranks.clone()).or_insert(0);
        *count += 1;
        let id = GroupId {
            members: world_ranks,
            parent: Some(self.id.clone()),
            number: *count,
        };
        Ok(Self::new(Arc::new(id), rank))
    }
}
