// The catalogue: which snapshots there are, in a form that a killed process leaves
// whole.
//
// A snapshot's record goes through these states, each by one store:
//
//	free -> prepared -> live -> dying -> free
//
// While a record is prepared, the layers and frozen maps of its devices come into
// being; the store of "live", while the gates of all devices are shut, makes them
// a snapshot, of all devices or of none. After it each layer is marked as
// committed, so that it is known as one that counts when the record is gone. The
// store of "dying" ends the snapshot, for all devices again. What a start finds
// prepared it undoes, what it finds dying it finishes (recover.go).

package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Catalogue knows the snapshots of a run directory. Its methods may be called
// from many goroutines at once.
type Catalogue struct {
	dir   string // empty: nothing outlives the process
	state string // empty: nothing outlives the machine
	disk  stateDisk
	boot  string

	// patience is for the calls on disk of those who open devices.
	patience patience

	mem *memory

	// booted is when the machine was started, in nanoseconds since 1970; 0 where that
	// is not known.
	booted int64

	// found are the snapshots that a predecessor left, by id. Their devices add
	// the images when they are opened.
	found map[uint64]*Snapshot

	// damaged says that there are records of snapshots which cannot be read.
	damaged error

	// replacing is held while memory that faulted is replaced.
	replacing sync.Mutex

	// step, if set, is called after each change of what a start would find: tests
	// look there what a kill at that moment leaves.
	step func(what string)

	// mu protects the fields below.
	mu     sync.Mutex
	free   []record
	opened map[string]bool // names of the devices that were opened

	// doubted are the names of the devices that Recover distrusts (distrust.go), with the
	// device where that has its state in memory; recovered says that it was called.
	doubted   map[string]*Device
	recovered bool

	// leaving are closed when the state of the devices is gone which were removed last, by
	// their names (owndisk.go).
	leaving map[string]chan struct{}

	// waiting are the devices that have to be resumed by Recover, because they have
	// layers of a predecessor, in the order in which they were opened.
	waiting []*Device
}

func (c *Catalogue) did(what string) {
	if c.step != nil {
		c.step(what)
	}
}

// record is the record of one snapshot, in the catalogue's memory.
type record []byte

// maxSnapshots bounds the address space of a catalogue.
const maxSnapshots = 1 << 20

// OpenCatalogue opens the catalogue in the run directory dir, or makes an empty one
// where there is none, it is of another boot, or cannot be used; why tells that it
// could not. What devices keep for the next boot goes to the directory state.
// Where a directory is empty, nothing outlives the process, or the machine.
func OpenCatalogue(dir, state string) (c *Catalogue, why, err error) {
	boot, err := bootID()
	if err != nil {
		return nil, nil, err
	}
	if err := regainDevices(dir); err != nil {
		return nil, nil, err
	}
	c, why, err = openSoundCatalogue(dir, boot)
	if err != nil {
		return nil, nil, fmt.Errorf("open catalogue of snapshots: %w", err)
	}
	c.state, c.booted = state, bootTime()
	return c, why, nil
}

// regainDevices gives us back the directory of what devices keep, where somebody's chmod
// took it from us: who cannot list it knows of no device that is not there any more.
func regainDevices(dir string) error {
	path := filepath.Join(dir, "devices")
	if dir == "" || !errors.Is(unix.Access(path, unix.R_OK|unix.W_OK|unix.X_OK), unix.EACCES) {
		return nil
	}
	return os.Chmod(path, 0o700)
}

// openSoundCatalogue opens a catalogue, an empty one if need be.
func openSoundCatalogue(dir, boot string) (c *Catalogue, why, err error) {
	if err = wholeCatalogue(dir); err == nil {
		c, err = openCatalogue(dir, boot)
	}
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) {
		why = err
		if err = discardCatalogue(dir); err == nil {
			c, err = openCatalogue(dir, boot)
		}
	}
	if err == nil && why == nil {
		why = c.damaged
	}
	return c, why, err
}

// wholeCatalogue says whether the catalogue's file is there, or is of no use, and was not
// cut short: to be mapped it is made longer, with zeroes, and snapshots that are gone
// would be snapshots that nobody took.
func wholeCatalogue(dir string) error {
	if dir == "" {
		return nil
	}
	st, err := os.Lstat(filepath.Join(dir, "catalogue"))
	switch {
	case err == nil && !st.Mode().IsRegular():
		return fmt.Errorf("%w: catalogue: it is not a regular file", ErrDamaged)
	case err == nil && st.Size()%memoryStep != 0:
		return fmt.Errorf("%w: catalogue: it is cut short, to %d bytes", ErrDamaged, st.Size())
	case err == nil && st.Size() == 0 && anyLayer(dir):
		return fmt.Errorf("%w: catalogue: it was emptied", ErrDamaged)
	case errors.Is(err, os.ErrNotExist) && anyLayer(dir):
		return fmt.Errorf("%w: catalogue: it is not there", ErrDamaged)
	}
	return nil // what else is wrong is said by who opens it
}

// anyLayer says whether there is a device with a layer in the run directory dir.
func anyLayer(dir string) bool {
	layers, err := filepath.Glob(filepath.Join(dir, "devices", "*", "layer-*"))
	return err == nil && len(layers) > 0
}

func openCatalogue(dir, boot string) (*Catalogue, error) {
	c := &Catalogue{
		dir: dir, disk: hostDisk{}, boot: boot,
		found: make(map[uint64]*Snapshot), opened: make(map[string]bool), doubted: make(map[string]*Device),
		leaving: make(map[string]chan struct{}),
	}
	path := ""
	if dir != "" {
		path = filepath.Join(dir, "catalogue")
	}
	var err error
	if c.mem, err = memoryAt(path, catalogueHeader+maxSnapshots*recordBytes); err != nil {
		return nil, err
	}
	err = c.begin(boot)
	if errors.Is(err, errOtherBoot) {
		c.mem.Close()
		if err := discardCatalogue(dir); err != nil {
			return nil, err
		}
		return openCatalogue(dir, boot)
	}
	if err != nil {
		c.mem.Close()
		return nil, err
	}
	return c, nil
}

var errOtherBoot = errors.New("state of another boot")

const catalogueConstant = 52

// begin writes the header of an empty catalogue, or checks the one that is there.
func (c *Catalogue) begin(boot string) error {
	if c.mem.Len() == 0 {
		if err := c.mem.Grow(memoryStep); err != nil {
			return err
		}
	}
	b := c.mem.Bytes()[:catalogueHeader]
	err := checkMagic(b, catalogueMagic, catalogueVersion, catalogueConstant)
	switch {
	case errors.Is(err, errBlank):
		// What devices left without a catalogue may be of another boot, and of
		// snapshots whose ids will be given out again.
		if err := c.discardDevices(); err != nil {
			return err
		}
		copy(b[16:catalogueConstant], boot)
		putMagic(b, catalogueMagic, catalogueVersion, catalogueConstant)
	case err != nil:
		return err
	case string(b[16:catalogueConstant]) != boot:
		return errOtherBoot
	}
	c.readRecords()
	return nil
}

// Boot names the machine's present start.
func (c *Catalogue) Boot() string { return c.boot }

// Close leaves the content as it is.
func (c *Catalogue) Close() error { return c.mem.Close() }

// records yields all records.
func (c *Catalogue) records() func(func(record) bool) {
	return func(yield func(record) bool) {
		for off := int64(catalogueHeader); off < c.mem.Len(); off += recordBytes {
			if !yield(record(c.mem.Bytes()[off : off+recordBytes])) {
				return
			}
		}
	}
}

// prepare takes a free record for a snapshot with a number of images.
func (c *Catalogue) prepare(name string, note []byte, images int) (record, uint64, error) {
	if len(name) > maxName || len(note) > maxNote {
		return nil, 0, fmt.Errorf("name of %d bytes, note of %d: at most %d and %d", len(name), len(note), maxName, maxNote)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mem.lost.Load() {
		return nil, 0, errCatalogue
	}
	if len(c.free) == 0 {
		off := c.mem.Len()
		if err := c.mem.Grow(memoryStep); err != nil {
			return nil, 0, err
		}
		for ; off < c.mem.Len(); off += recordBytes {
			c.free = append(c.free, record(c.mem.Bytes()[off:off+recordBytes]))
		}
	}
	r := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	var id uint64
	if !c.guarded(func() {
		id = wordAt(c.mem.Bytes(), catalogueLastID).Add(1)
		recordInfo{id, images, name, note}.encode(r)
		r.setState(statePrepared)
	}) {
		return nil, 0, errCatalogue
	}
	c.did("prepare a record")
	return r, id, nil
}

// release makes a record free.
func (c *Catalogue) release(r record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guarded(func() { r.setState(stateFree) })
	c.free = append(c.free, r)
	c.did("free a record")
}

func (r record) state() uint64     { return wordAt(r, recordState).Load() }
func (r record) setState(s uint64) { wordAt(r, recordState).Store(s) }

func (r record) taken() time.Time {
	return time.Unix(0, int64(wordAt(r, recordTaken).Load()))
}

func (r record) setTaken(t time.Time) { wordAt(r, recordTaken).Store(uint64(t.UnixNano())) }

func (r record) held() time.Duration     { return time.Duration(wordAt(r, recordHeld).Load()) }
func (r record) setHeld(d time.Duration) { wordAt(r, recordHeld).Store(uint64(d)) }

// BootID names the machine's present start.
func BootID() (string, error) { return bootID() }

// bootID changes with every boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("tell this boot from others: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// bootTime is when the machine was started, by the clock as it is set now, in nanoseconds
// since 1970; 0 where that is not known.
func bootTime() int64 {
	var now, up unix.Timespec
	// In this order it is never later than it was.
	err := errors.Join(unix.ClockGettime(unix.CLOCK_REALTIME, &now), unix.ClockGettime(unix.CLOCK_BOOTTIME, &up))
	if err != nil {
		return 0
	}
	return now.Nano() - up.Nano()
}

// discardCatalogue removes the catalogue of a run directory. Who begins a new one discards
// what devices keep there.
func discardCatalogue(dir string) error { return os.RemoveAll(filepath.Join(dir, "catalogue")) }

// deviceDir is where the state of a device is, empty where there is none.
func (c *Catalogue) deviceDir(name string) string {
	if c.dir == "" {
		return ""
	}
	return filepath.Join(c.dir, "devices", name)
}

// stateDir is where a device keeps what outlives the machine.
func (c *Catalogue) stateDir(name string) string {
	if c.state == "" {
		return ""
	}
	return filepath.Join(c.state, "devices", name)
}
