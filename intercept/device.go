// What an export serves: the interfaces through which the shim reaches a
// live device or an image.

package intercept

import (
	"context"
	"iter"
	"syscall"
)

// Device is what an export serves. The server calls it from many goroutines
// at once, also for ranges that overlap. Offsets and lengths are in bytes, lie
// within Size and need not be aligned to anything; n is never 0 and p is never
// empty.
//
// The slices are the server's again when a method returns.
//
// Errors are matched with errors.Is against package syscall's: EPERM, EIO,
// ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN; anything else is EIO
// on the wire.
type Device interface {
	// Size is constant for the life of the Device.
	Size() int64

	// ReadOnly says that Write, WriteZeroes and Trim would fail with EPERM;
	// the server then does not call them.
	ReadOnly() bool

	// Read fills p completely with the bytes from off, or returns an error.
	Read(p []byte, off int64) error

	// Write makes p visible to reads that start after it returns. It is
	// durable on return if fua is set, else once a Flush that starts after
	// it has returned nil. p is not kept.
	Write(p []byte, off int64, fua bool) error

	// WriteZeroes makes [off, off+n) read as zeroes, by the same rules.
	WriteZeroes(off, n int64, f ZeroFlags) error

	// Trim says that the content of [off, off+n) is no longer needed: each
	// byte of it keeps its value or becomes zero.
	Trim(off, n int64, fua bool) error

	// Flush returns nil when every write that was acknowledged before the
	// call is on stable storage.
	Flush() error

	// Cache is a hint that [off, off+n) will be read soon.
	Cache(off, n int64) error
}

// ZeroFlags are the command flags of a WRITE_ZEROES request. It is an alias so
// that an implementation elsewhere need not name this package.
type ZeroFlags = struct {
	FUA    bool // durable on return
	NoHole bool // the range must be allocated afterwards
	Fast   bool // fail with ENOTSUP where it would not be faster than a Write
}

// ErrWouldBlock is returned by the Try methods: nothing was done, and the same
// request must be given to the method without Try, from a goroutine that may
// wait.
var ErrWouldBlock error = syscall.EAGAIN

// ErrTaken is returned by TryWrite after it has called taken: the write belongs to
// another goroutine, and so does what its caller shares with others.
var ErrTaken error = syscall.EINPROGRESS

// A Device that can say at once whether a request would wait implements
// TryReader or TryWriter; the server then calls these from the goroutine that
// reads the socket. Neither waits for a disk, a lock that is held across I/O,
// or space. TryRead may leave anything in p where it fails; TryWrite has no
// FUA: such writes are given to Write.
//
// If taken is not nil, TryWrite may do what can hang after all, where that is rare.
// When it has hung for a while, it calls taken, once and from another goroutine, and
// returns ErrTaken, whenever that may be. rest waits for the write and returns its
// result; it is called once, as soon as there is a goroutine that may wait. p is the
// server's again when rest returns. taken does not wait.
type (
	TryReader interface {
		TryRead(p []byte, off int64) error
	}
	TryWriter interface {
		TryWrite(p []byte, off int64, taken func(rest func() error)) error
	}
)

// Extent is a run of bytes that share a property. It is an alias for the reason
// that ZeroFlags is one.
type Extent = struct {
	N     int64  // length in bytes, at least 1
	Flags uint32 // as the metadata context defines them
}

// A Mapper answers block status for its metadata contexts.
type Mapper interface {
	// Contexts names the metadata contexts offered now, in a fixed order,
	// without those that are only found by name.
	Contexts() []string

	// HasContext says whether name is offered, also if Contexts does not
	// list it.
	HasContext(name string) bool

	// Status yields the extents of context name from off on, in order and
	// without gaps, to at least off+n; the last one may go beyond, never
	// beyond Size. A non-nil error ends the sequence. The caller stops
	// early where it has enough.
	Status(name string, off, n int64) iter.Seq2[Extent, error]
}

// ExportInfo describes an export to LIST and INFO.
type ExportInfo struct {
	Name        string // canonical: never empty
	Description string // one line for people, may be empty
}

// Exports is the set of what can be opened; it changes while the server runs.
type Exports interface {
	// List names the exports, sorted.
	List() []ExportInfo

	// Open opens an export for one connection. The empty name means the only
	// live device, where there is only one. release is called once, after the
	// connection's last request has ended. Errors: ENOENT for an unknown name,
	// ESHUTDOWN for one on its way out; the error's text is sent to the client.
	// ctx ends with the time that the client has for its handshake.
	Open(ctx context.Context, name string, client string) (e Export, err error)
}

// Export is one connection's use of a Device.
type Export struct {
	ExportInfo
	Device  Device
	Release func() // never nil

	// Gone is closed when the export goes away under the client (snapshot
	// destroyed, device removed): requests are answered with ESHUTDOWN from
	// then on. May be nil.
	Gone <-chan struct{}
}
