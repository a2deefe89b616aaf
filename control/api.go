// The control API: what goes over the control socket, as HTTP and JSON. Keys
// are the names that the tree uses, sizes are in bytes.
//
//	GET    /version
//	GET    /devices                       []DeviceInfo
//	POST   /devices                       DeviceRequest -> DeviceInfo
//	GET    /devices/NAME                  DeviceInfo
//	DELETE /devices/NAME
//	POST   /devices/NAME/resize           ResizeRequest -> DeviceInfo
//	GET    /devices/NAME/cbt              ChangesInfo
//	GET    /devices/NAME/cbt/extents      Extent, one a line; since, at, generation
//	POST   /devices/NAME/cbt/mark         MarkRequest
//	POST   /devices/NAME/cbt/reset
//	GET    /snapshots                     []SnapshotInfo, oldest first
//	POST   /snapshots                     SnapshotRequest -> SnapshotInfo
//	POST   /snapshots/destroy             DestroyRequest
//	POST   /freeze                        FreezeRequest: refused if they must not be frozen
//	GET    /snapshots/NAME                SnapshotInfo
//	POST   /snapshots/NAME/rollback       RollbackRequest -> RollbackInfo
//	GET    /store                         []PartInfo
//	POST   /store                         PartRequest
//	GET    /state/check                   []StateProblem
//	GET    /events                        Event, one a line; follow
//
// A refused or failed request is answered with an Error. A stream that fails
// after it has begun ends with a line {"error": ...}.

package control

import "time"

// VersionInfo says who answers.
type VersionInfo struct {
	Version  string `json:"version"`
	PID      int    `json:"pid"`
	Stopping bool   `json:"stopping"` // no request that changes anything is taken any more
}

// DeviceInfo describes a device as it is now.
type DeviceInfo struct {
	Name      string        `json:"name"`
	Origin    string        `json:"origin"`
	Size      int64         `json:"size"`
	URI       string        `json:"uri"`
	State     string        `json:"state"`
	Clients   int           `json:"clients"`   // NBD connections to the live export
	Snapshots []string      `json:"snapshots"` // oldest first
	CBT       ChangesInfo   `json:"cbt"`
	StoreWait time.Duration `json:"store_wait_ns"` // how long a write waits for space
}

// ChangesInfo describes the change tracking of a device, or of an image, for
// which it is frozen.
type ChangesInfo struct {
	BlockSize  int64  `json:"block_size"`
	Generation string `json:"generation"`
	Number     uint64 `json:"number"`
	Base       uint64 `json:"base"`

	// Reason is why the generation began, as far as that is known: of a device, since
	// the machine was started; of an image never.
	Reason string `json:"reason,omitempty"`

	// Warning is why the change tracking of a device may not outlive the machine as it
	// should; empty where it does.
	Warning string `json:"warning,omitempty"`
}

// SnapshotInfo describes a snapshot as it is now.
type SnapshotInfo struct {
	Name     string        `json:"name"`
	Created  time.Time     `json:"created"`
	State    string        `json:"state"`
	Writable bool          `json:"writable"`            // its images can be written to
	HeldUp   time.Duration `json:"held_up_ns"`          // how long writes waited while it was taken
	MaxStore int64         `json:"max_store,omitempty"` // bytes of the snapstore that it may need
	Expires  *time.Time    `json:"expires,omitempty"`
	Images   []ImageInfo   `json:"images"` // by device

	// Store is how long the snapstore lasts; only where one snapshot is asked for.
	Store *SpaceInfo `json:"store,omitempty"`
}

// ImageInfo describes one device's content in a snapshot.
type ImageInfo struct {
	Device string      `json:"device"`
	Size   int64       `json:"size"`
	URI    string      `json:"uri"`
	State  string      `json:"state"`
	Holds  int64       `json:"holds"` // bytes in the snapstore that nobody else needs
	CBT    ChangesInfo `json:"cbt"`

	// Shares is how many bytes of the snapstore it reads that others need, too. It
	// takes a look at all of them: only where one snapshot is asked for.
	Shares *int64 `json:"shares,omitempty"`
}

// Extent is a run of bytes that a copy has to deal with: read it (data), or
// only zero it (zero).
type Extent struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Kind   string `json:"kind"`
}

// PartInfo describes a part of the snapstore. Bytes count blocks in use, not
// slots.
type PartInfo struct {
	Part  string `json:"part"` // as --store names it, without limit
	Size  int64  `json:"size"`
	Used  int64  `json:"used"`
	Free  int64  `json:"free"`
	State string `json:"state"`
}

// StateProblem is something in the run or the state directory that does not add up.
type StateProblem struct {
	File    string `json:"file"`
	Problem string `json:"problem"`
	Advice  string `json:"advice"` // what to do
}

// SpaceInfo is how much room the snapstore has and how long that lasts.
type SpaceInfo struct {
	Size int64         `json:"size"`
	Free int64         `json:"free"`
	Rate int64         `json:"rate"`              // bytes that are used up each second, of late
	Left time.Duration `json:"left_ns,omitempty"` // until it is full at that rate; none where the rate is 0
}

// DeviceRequest asks for an origin to be put under tracking. Origin is
// absolute: the daemon's working directory is not its client's.
type DeviceRequest struct {
	Name   string `json:"name"`
	Origin string `json:"origin"`
	DeviceConfig
}

// DestroyRequest asks for snapshots to be destroyed.
type DestroyRequest struct {
	Names []string `json:"names"`
	Force bool     `json:"force,omitempty"` // also those in use
}

// RollbackRequest asks for devices to become what they were at a snapshot.
type RollbackRequest struct {
	Devices []string `json:"devices,omitempty"` // empty: all of the snapshot's
	Force   bool     `json:"force,omitempty"`   // disconnect their clients
}

// RollbackInfo says which devices were rolled back.
type RollbackInfo struct {
	Devices []string `json:"devices"`
}

// ResizeRequest asks for a device to become as long as its origin is.
type ResizeRequest struct {
	// Shrink cuts the origin, a file, to so many bytes before; 0: it stays as it is.
	Shrink int64 `json:"shrink,omitempty"`
}

// PartRequest adds a part to the snapstore: mem[:LIMIT], file:PATH[:LIMIT] or
// dev:PATH, the path absolute. Force takes what holds something else.
type PartRequest struct {
	Spec  string `json:"spec"`
	Force bool   `json:"force"`
}

// SnapshotRequest asks for a snapshot: without a name it is called by its
// time, without devices it is of all of them.
type SnapshotRequest struct {
	Name    string        `json:"name,omitempty"`
	Devices []string      `json:"devices,omitempty"`
	TTL     time.Duration `json:"ttl_ns,omitempty"` // it is destroyed after that

	// Writable makes images that can be written to.
	Writable bool `json:"writable,omitempty"`

	// MaxStore is how many bytes of the snapstore it may need, else it is lost; 0: as
	// many as there are.
	MaxStore int64 `json:"max_store,omitempty"`
}

// FreezeRequest asks whether the file systems that are mounted at these absolute
// paths may be frozen.
type FreezeRequest struct {
	Mounts []string `json:"mounts"`
}

// MarkRequest asks for ranges, each "OFFSET:LENGTH", to count as changed.
type MarkRequest struct {
	Ranges []Range `json:"ranges"`
}

// ExtentsQuery asks what a copy of a device has to read.
type ExtentsQuery struct {
	Since      Since  // number of the last snapshot that was copied, or "all"
	At         string // snapshot to copy; empty: the live device
	Generation string // what generation the caller knows; empty: any
}
