// A device: an origin under tracking, with its snapshots.

package cow

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"blksnap/cbt"
	"blksnap/store"
)

// Errors of requests on devices and images. They match what a client is told
// (errors.Is with package syscall's).
var (
	// ErrStopping answers requests to a device that is being closed.
	ErrStopping = fmt.Errorf("device is stopping: %w", syscall.ESHUTDOWN)

	// ErrDestroyed answers requests to an image whose snapshot was destroyed.
	ErrDestroyed = fmt.Errorf("snapshot was destroyed: %w", syscall.ESHUTDOWN)

	// ErrOverflowed answers requests to an image that the snapstore had no
	// room for.
	ErrOverflowed = fmt.Errorf("snapshot was lost, the snapstore overflowed: %w", syscall.EIO)

	// ErrRollback answers writes to a device that is being rolled back, and
	// whatever else must not happen meanwhile.
	ErrRollback = fmt.Errorf("device is being rolled back: %w", syscall.EBUSY)

	// ErrFailed answers requests to an image that was lost for another reason,
	// which the error's text has.
	ErrFailed = fmt.Errorf("snapshot was lost: %w", syscall.EIO)
)

// Config is how a device is opened. The zero value of a field is its default.
type Config struct {
	Name string

	// TrackingBlock is the unit of the change map in bytes, a power of two
	// from 4 KiB to 16 MiB (default 64 KiB, or what it was).
	TrackingBlock int64

	// Number is where a new generation begins: above every number that a snapshot
	// of this device ever had, as far as the device's own state does not know
	// better. (The last number itself will not do: what changed since that
	// snapshot is not known.)
	Number uint64

	// StoreWait is how long a write waits for space in a full snapstore before
	// snapshots break.
	StoreWait time.Duration

	// PreserveLimit is how long a write waits for a snapstore that hangs
	// before snapshots break (default 10 s).
	PreserveLimit time.Duration

	// Log gets what an operator must know. Notify, if not nil, is called for
	// each event, from any goroutine, without locks, and must not wait.
	Log    *slog.Logger
	Notify func(Event)
}

// Device is an origin under tracking. Reads and writes come from many goroutines
// at once, also for ranges that overlap; they lie within Size.
type Device struct {
	name    string
	cat     *Catalogue
	dir     string // where its state is, empty where that is in memory
	origin  *Origin
	file    originFile
	pool    *store.Pool
	cfg     Config
	serial  uint64                  // devices of one snapshot are taken in this order
	tracked atomic.Pointer[cbt.Map] // replaced while nobody is inside writers
	flusher *flusher
	copier  *copier
	flights sync.Pool // of *flight

	// size is in bytes. It changes under taking, while nobody is inside writers.
	size atomic.Int64

	// writers is passed by everything that changes the device, shut while a
	// snapshot is taken. readers is passed by everything that looks at tables
	// or slots without being a writer; it is never shut.
	writers, readers *gate

	// shield is what writers look at, nil while no healthy image needs them
	// to. Stored under mu.
	shield atomic.Pointer[shield]

	// rollback is the image that the device is being rolled back to, or has to be
	// further. It is set under taking and mu, and cleared under mu by whoever has set
	// it or where the image is lost (rollback.go).
	rollback atomic.Pointer[Image]

	// tear is what a rollback has begun and not ended, nil where the content is all
	// of one state (tear.go).
	tear atomic.Pointer[tear]

	// limits is how many of its images belong to snapshots with a limit (limit.go).
	// Stored under mu.
	limits atomic.Int32

	failure  atomic.Pointer[string]    // why the device is failed
	began    atomic.Pointer[beginning] // of the present generation, or the next
	inMemory error                     // why its state is nowhere but in memory; nil where it is not
	toldLost bool                      // that it lost all images while it was opened

	// durable is what outlives the machine, nil where nothing does. lease is until
	// when our own writes may stamp the origin (durable.go).
	durable atomic.Pointer[durable]
	lease   *atomic.Int64
	leased  atomic.Int64 // what lease holds, in memory that cannot fault
	leasing sync.Mutex   // held while both are written; protects left

	// counts says that the kernel counts what is written to the origin, counted that
	// the lease file has the number, left that it is for somebody else now (written.go).
	counts   bool
	counted  atomic.Bool
	left     bool
	ended    bool // the lease file has a clean end; protected by leasing
	tallying single

	// leaseTimer, while the lease runs, calls tendLease, which was called last, or begun
	// anew, at tended. stamping is how many change the origin outside the gate.
	leaseTimer *time.Timer
	tended     atomic.Int64
	stamping   atomic.Int32
	extending  single
	tending    sync.Mutex // held while tendLease runs; protects untended
	untended   bool

	leaseMemory *memory
	mapMemory   *memory               // of the change map
	register    *register             // of its layers; nil where it has no state
	stateDir    string                // where durable is, empty where nothing outlives the machine
	disk        *ownDisk              // which it is on
	predecessor <-chan struct{}       // closed when stateDir is its own; nil: it is
	reason      atomic.Pointer[error] // why the generation must end, as yet
	trouble     atomic.Pointer[error] // why it could not be written down last, nil where it could
	writing     atomic.Int64          // since when it is being written down, nanoseconds; 0: it is not
	poked       chan struct{}         // wakes keepDurable
	keeping     chan struct{}         // full while somebody replaces durable, or writes it down
	ending      sync.Mutex            // held while it is noted that the generation ends

	forgetting atomic.Pointer[chan struct{}] // closed when the last forgetter has ended

	stop    chan struct{} // closed when the device closes
	wake    chan struct{} // wakes the reclaimer
	running sync.WaitGroup

	// Locks, in the order in which they are taken.

	// rolling is held while a rollback runs.
	rolling sync.Mutex

	// taking serializes taking snapshots of the device. Held until the writes
	// in flight have ended.
	taking    sync.Mutex
	nextLayer uint64 // number of the next layer; protected by taking

	// chunkLocks serialize the preserving of a chunk. Held across I/O.
	chunkLocks chunkLocks

	// mu protects the fields below. Never held across I/O.
	mu       sync.Mutex
	layers   []*layer // oldest first
	images   []*Image // healthy ones, oldest first
	round    uint64   // number of the reclaimer's last complete round
	asked    uint64   // number of the round that covers all that was asked for
	settled  *sync.Cond
	retired  scrap               // for the reclaimer's next round
	unwanted []addition          // of a rollback, for the same round
	stuck    map[store.Slot]bool // slots in use in which a write hangs
	closed   bool
	late     []lateFault // which nobody was told of yet
}

// path is where the device keeps a file in its run directory; empty where it keeps
// nothing.
func (d *Device) path(name string) string {
	if d.dir == "" {
		return ""
	}
	return filepath.Join(d.dir, name)
}

// Close stops the device: new requests to it and its images are answered with
// ErrStopping. It waits for the requests in flight and gives the origin's locks
// back. What was not flushed to a file is left to the host's page cache, and all state where
// it is, for the next Open.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	close(d.stop)
	// Images end when nobody is left to act on it: the reclaimer would take them
	// for destroyed, and a writer would preserve nothing for them, though the next
	// Open opens them again. Those who run may want taking before they see stop.
	d.running.Wait()
	d.rolling.Lock() // a rollback ends at its next window
	defer d.rolling.Unlock()
	d.taking.Lock()
	defer d.taking.Unlock()
	d.writers.shut() // for ever
	d.writers.turn(nil)
	d.mu.Lock()
	images := slices.Clone(d.images)
	d.mu.Unlock()
	d.leaveLease()
	d.tallying.wait() // whose limit is that of countWritten
	for _, i := range images {
		i.end(stopping)
	}
	err := errors.Join(d.closeTables(), d.register.close())
	d.copier.close()
	err = errors.Join(err, d.closeDurable())
	d.changes().Close()
	d.tellLate()
	err = errors.Join(err, d.origin.Close())
	if err != nil {
		return fmt.Errorf("close %s: %w", d.name, err)
	}
	return nil
}

// Remove is Close for a device that will not come back: its state goes, too. What is on a
// state disk that hangs goes when that answers again; a device may be opened with the same
// name when Remove has returned.
func (d *Device) Remove() error {
	err := d.Close()
	if d.stateDir != "" {
		err = errors.Join(err, d.leaveState())
	}
	if d.dir != "" {
		err = errors.Join(err, os.RemoveAll(d.dir)) // after what says whether the state is behind
	}
	return err
}

// leaveState removes what outlives the machine, or, where that does not work, notes that
// nobody may believe it: it may look sound, and the lease file, which knows better, goes.
func (d *Device) leaveState() error {
	done := d.cat.leave(d.name)
	err := within(d.cfg.PreserveLimit, func() error {
		defer done()
		return d.removeState()
	})
	if err != nil {
		err = errors.Join(err, d.cat.distrust(d.name))
	}
	return err
}

// Name is the device's name.
func (d *Device) Name() string { return d.name }

// Origin is the origin's absolute path.
func (d *Device) Origin() string { return d.origin.path }

// Size is in bytes. Only Resize and Shrink change it.
func (d *Device) Size() int64 { return d.size.Load() }

// ReadOnly is false.
func (d *Device) ReadOnly() bool { return false }

// State is "ok", "ok, in memory only: " and why its state is, "stopping", or "failed: "
// and why.
func (d *Device) State() string {
	if why := d.failure.Load(); why != nil {
		return "failed: " + *why
	}
	if d.stopped() {
		return "stopping"
	}
	if t := d.tear.Load(); t != nil && d.RollingBack() == nil {
		return "failed: " + t.String()
	}
	if d.inMemory != nil {
		return "ok, in memory only: " + d.inMemory.Error()
	}
	return "ok"
}

// stopped says whether the device is being closed.
func (d *Device) stopped() bool {
	select {
	case <-d.stop:
		return true
	default:
		return false
	}
}

// Read fills p with the device's current content. It passes no gate and takes no
// lock: no snapshot can hold it up.
func (d *Device) Read(p []byte, off int64) error {
	_, err := d.file.ReadAt(p, off)
	if err != nil {
		// What is beyond the end is no failure of the origin.
		if err := d.within("read", off, int64(len(p)), syscall.EINVAL); err != nil {
			return err
		}
		return d.originError("read", off, err)
	}
	return nil
}

// within fails with errno where the device does not hold [off, off+n). Whoever was
// told its size before it became smaller may ask for such a range.
func (d *Device) within(op string, off, n int64, errno error) error {
	if size := d.Size(); off > size-n {
		return fmt.Errorf("%s %s at %d: %d bytes are not within its %d: %w", op, d.name, off, n, size, errno)
	}
	return nil
}

// TryRead is Read where no disk is waited for, else EAGAIN.
func (d *Device) TryRead(p []byte, off int64) error {
	if d.file.tryReadAt(p, off) != nil {
		return syscall.EAGAIN // Read will find out what is wrong, if anything is
	}
	return nil
}

// Flush returns nil when every write that was acknowledged before the call is on
// stable storage. Once it failed it fails for ever: the kernel drops what it
// could not write, and tells only once.
func (d *Device) Flush() error { return d.flush(false) }

// flush is Flush; with complete set the times and attributes of the origin are on stable
// storage, too.
func (d *Device) flush(complete bool) error {
	err := d.flusher.flush(complete)
	if errors.Is(err, os.ErrClosed) {
		return ErrStopping
	}
	if err != nil {
		d.fail(fmt.Sprintf("flush: %v", cause(err)))
		return fmt.Errorf("flush %s: %w", d.name, err)
	}
	return nil
}

// Cache is a hint that the range will be read soon.
func (d *Device) Cache(off, n int64) error {
	d.file.willNeed(off, n)
	return nil
}
