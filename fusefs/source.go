// What the tree shows: the interfaces through which the tree reaches devices,
// snapshots and images.

package fusefs

import (
	"io"
	"iter"
	"time"
)

// Source is what the tree is a view of. Its methods are called from many
// goroutines at once, and its content changes while the tree is mounted. What
// comes is found at the next lookup; of what goes the Source's owner tells the
// tree by Tree.DeviceRemoved and Tree.SnapshotDestroyed.
type Source interface {
	// Version is the first line of /version, without newline.
	Version() string

	// Devices and Snapshots are sorted by name. Device and Snapshot return
	// false for an unknown name. For the same device or snapshot they return
	// equal values each time (as == compares them), for another one of the
	// same name a different value: by that the tree knows them apart.
	Devices() []string
	Device(name string) (Device, bool)
	Snapshots() []string
	Snapshot(name string) (Snapshot, bool)

	// Latest names the newest snapshot; empty if there is none.
	Latest() string

	// Take takes a snapshot of every device (mkdir), Destroy destroys one
	// (rmdir). Snapshot finds it, or no longer, when they return. Errors are
	// matched against package syscall's: EEXIST, EINVAL, ENOSPC, ETIMEDOUT,
	// EBUSY, ENOENT; anything else is EIO.
	Take(name string) error
	Destroy(name string) error

	// Space is the size of the snapstore and what is free of it, in bytes.
	Space() (size, free int64)
}

// Device is one device below /devices.
type Device interface {
	Origin() string // path
	Size() int64    // bytes
	URI() string    // NBD URI of its live export
	State() string  // "ok", "ok, in memory only: why", "stopping" or "failed: why"

	// Tracking is what its change tracking is called and counts as of this
	// call. Unlike Changes it costs the device's writers nothing: scripts ask
	// for the number every second.
	Tracking() Tracking

	// Changes is the change tracking as of this call; it does not change
	// afterwards.
	Changes() Changes
}

// Snapshot is one snapshot below /snapshots.
type Snapshot interface {
	Created() time.Time
	State() string    // "ok", "overflowed" or "failed: why": the worst of its images
	Images() []string // the names of its devices, sorted
	Image(device string) (Image, bool)
}

// Image is one device's content in one snapshot.
type Image interface {
	// ReadAt fills p or returns an error; io.EOF beyond Size. Once the
	// snapshot is destroyed or broken every call returns an error, also if p
	// is full.
	io.ReaderAt

	// WriteAt, Zero (which may free what it covers) and Sync fail with EROFS
	// where the image is not Writable.
	io.WriterAt
	Zero(off, n int64) error
	Sync() error
	Writable() bool

	Size() int64
	State() string

	// Allocated is how many bytes of the image are not a hole. It is asked at
	// a stat, not at a lookup, and may take its time. NextData and NextHole
	// return the first offset at or after off that is data, or a hole; the
	// end of the image counts as a hole. NextData fails with ENXIO where no
	// data follows. What is a hole is fixed when first asked and kept while
	// the snapshot lives.
	Allocated() (int64, error)
	NextData(off int64) (int64, error)
	NextHole(off int64) (int64, error)

	// Acquire says that a file of the image is open, Release that it was
	// closed; in between the snapshot counts as in use. Acquire fails once
	// the snapshot is destroyed or broken. Release does not wait.
	Acquire() error
	Release()

	// Changes is the change tracking frozen at the snapshot, with what was
	// marked since because of writes to its image or to an older one.
	Changes() Changes
}

// Tracking is what the names and the small files of a cbt directory say.
type Tracking interface {
	MapSize() int64     // bytes: one for each tracking block
	BlockSize() int64   // bytes
	Generation() string // UUID
	Number() uint64
	Base() uint64

	// Numbers are those of existing snapshots from Base to Number, ascending.
	Numbers() []uint64
}

// Changes is the content of one cbt directory: it never changes once it was
// handed out.
type Changes interface {
	Tracking

	// ReadMap fills p with the map's bytes from off on and returns how many
	// there were.
	ReadMap(p []byte, off int64) int

	// Since yields the runs of bytes changed after snapshot num, All those
	// that are allocated, in order, disjoint, and clipped to the device. Since
	// returns false if num is below Base or above Number.
	Since(num uint64) (iter.Seq2[Run, error], bool)
	All() iter.Seq2[Run, error]
}

// Run is a line of since/NUM. Zero says that it must be zeroed in the copy and
// need not be read. It is an alias so that package qcow2 need not name this one.
type Run = struct {
	Off, N int64
	Zero   bool
}
