// Opening a device: with what a predecessor left, or anew.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"blksnap/store"
)

var serials atomic.Uint64

// Open puts an origin under tracking. Where a predecessor left the device's state
// in the run directory, its snapshots are back with Recover and its change map goes
// on; else, and where that state cannot be used, a new generation begins after
// c.Number, and the event says why. The origin belongs to the device from then on,
// also where Open fails.
//
// Where the run directory does not take the state, the device goes on with it in memory
// (inmemory.go), and says so; once Recover was called Open fails instead.
func (c *Catalogue) Open(o *Origin, pool *store.Pool, cfg Config) (*Device, error) {
	d, err := c.open(o, pool, cfg)
	if err != nil {
		o.Close()
		return nil, fmt.Errorf("track %s: %w", cfg.Name, err)
	}
	if len(d.layers) == 0 { // else it begins with Recover
		d.tellTear()
		d.running.Go(d.reclaim)
	}
	if d.inMemory == nil {
		d.beginKeeping()
	}
	return d, nil
}

// beginKeeping begins to keep what outlives the machine.
func (d *Device) beginKeeping() {
	if d.stateDir == "" || d.cat.stateless() != nil {
		return
	}
	d.running.Go(d.keepDurable)
	if d.durable.Load() == nil {
		d.poke()
	}
}

func (c *Catalogue) open(o *Origin, pool *store.Pool, cfg Config) (*Device, error) {
	cfg.PreserveLimit = cmp.Or(cfg.PreserveLimit, 10*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Log = cfg.Log.With("device", cfg.Name)
	d := &Device{
		name: cfg.Name, cat: c, dir: c.deviceDir(cfg.Name), stateDir: c.stateDir(cfg.Name), origin: o, file: o.file, pool: pool, cfg: cfg,
		serial:  serials.Add(1),
		writers: newGate(),
		readers: newGate(),
		stop:    make(chan struct{}),
		wake:    make(chan struct{}, 1),
		poked:   make(chan struct{}, 1),
		keeping: make(chan struct{}, 1),
		lease:   new(atomic.Int64),
	}
	d.disk = &ownDisk{stateDisk: c.disk}
	c.mu.Lock()
	d.predecessor = c.leaving[cfg.Name]
	c.mu.Unlock()
	d.size.Store(o.size)
	d.leaseTimer = time.AfterFunc(time.Hour, d.tendLease)
	d.leaseTimer.Stop()
	d.flusher = newFlusher(d.file.sync)
	d.copier = newCopier(pool)
	d.flights.New = func() any { return newFlight(d) }
	d.settled = sync.NewCond(&d.mu)
	lost, err := d.begin()
	if err != nil {
		return nil, err
	}
	if _, d.counts = d.file.written(); d.counts {
		d.tallying.Do(d.tally) // a disk that was spun down takes seconds
	}
	if d.inMemory == nil {
		d.endFound()
	}
	if lost != nil {
		d.noteReason(d.changes().Generation(), lost.Error())
		d.tellGeneration(lost.Error())
	}
	if err := d.tellOthers(); err != nil {
		// The lease has begun: what others do to the origin from now on must not look
		// like our own doing.
		return nil, errors.Join(fmt.Errorf("note that its origin has another name now: %w", err), d.Close())
	}
	d.findTear()
	c.mu.Lock()
	c.opened[d.name] = true
	if len(d.layers) > 0 {
		c.waiting = append(c.waiting, d)
	}
	c.mu.Unlock()
	return d, nil
}

// begin finds or makes the device's state, in memory where the run directory does not take
// it. lost says why a new generation has begun, nil if none has.
func (d *Device) begin() (lost, err error) {
	lost, err = d.beginFiles()
	if err != nil && d.dir != "" && d.cat.starting() {
		return d.beginInMemory(err)
	}
	return lost, err
}

// beginFiles is begin where that is possible as it should be.
func (d *Device) beginFiles() (lost, err error) {
	if d.dir != "" {
		if err := os.MkdirAll(d.dir, 0o700); err != nil {
			return nil, err
		}
	}
	if lost, err = d.find(d.cat.distrusts(d.name)); err != nil {
		return nil, err
	}
	d.cat.trust(d.name)
	return lost, nil
}

// find opens the device's state, or begins anew.
func (d *Device) find(distrusted bool) (lost, err error) {
	if distrusted {
		return d.findWrittenDown(errDistrusted, time.Time{}, errDistrusted)
	}
	mem, was, lease, why := d.openLease()
	if mem == nil && !errors.Is(why, ErrDamaged) {
		return nil, why
	}
	if why != nil {
		lease = time.Time{} // not to be believed
	} else {
		why = d.opening(func() error { return d.recoverState(was.size) })
	}
	if why == nil {
		return d.findInBoot(mem, was, lease)
	}
	var behind error // whatever else is wrong
	if mem != nil && !lease.IsZero() {
		behind = cmp.Or(servedAs(mem), d.writtenSince(mem), leftBehind(mem))
	}
	if mem != nil {
		err = mem.Close()
	}
	if refused(why) {
		err = why
	}
	if err != nil {
		return nil, err
	}
	return d.findWrittenDown(why, lease, behind)
}

// findInBoot goes on with the state that a predecessor in this boot left, which was found.
func (d *Device) findInBoot(mem *memory, was identity, lease time.Time) (lost, err error) {
	now, err := d.file.identify(false)
	if err != nil {
		return nil, err
	}
	if lost = cmp.Or(servedAs(mem), was.foreign(now, lease, true, false), d.writtenSince(mem)); lost != nil {
		d.disown(lost)
	} else if d.stateDir != "" {
		d.reopenRecord(mem)
	}
	if err := d.beginLease(mem); err != nil {
		return nil, err
	}
	d.findReason()
	return lost, nil
}

// findWrittenDown goes on with the map that was written down, as after a reboot, or begins a
// new one. why says what is wrong with what the run directory has, which goes; lease and
// behind are for recoverDurable.
func (d *Device) findWrittenDown(why error, lease time.Time, behind error) (lost, err error) {
	why = d.tellWiped(why)
	if err := d.wipe(); err != nil {
		return nil, err
	}
	if d.stateDir != "" {
		if err := d.recoverDurable(lease, behind); err != nil && !errors.Is(err, errBlank) {
			why = err
		}
	}
	if d.changes() == nil {
		lost = why
		if errors.Is(why, errBlank) {
			lost = errNew
		}
		if err := d.newChanges(uuid.New()); err != nil {
			return nil, err
		}
	}
	if d.register, err = newRegister(d.path(registerName)); err != nil {
		return nil, err
	}
	// The lease is last: without one nobody believes the rest, and where this fails, who
	// knows what others do to the origin until the next start.
	mem, _, _, why := d.openLease()
	if mem == nil {
		return nil, why
	}
	return lost, d.beginLease(mem)
}

// Why a device without state that counts begins a generation.
var (
	errNew        = errors.New("the device is new")
	errDistrusted = errors.New("its files were given up before, by who could not use, change or remove them")
)

// disown gives the images up, because somebody else wrote to the origin, and the
// history with them.
func (d *Device) disown(why error) {
	d.mu.Lock()
	images := slices.Clone(d.images)
	d.mu.Unlock()
	for _, i := range images {
		d.breakImage(i, failed(why.Error()), why)
	}
	d.changes().Reset(uuid.New())
}

// tellWiped tells which images are about to be forgotten, and returns why: the
// generation may well go on, and a snapshot that lacks an image cannot say it.
func (d *Device) tellWiped(why error) error {
	layers, err := d.numbers(layerName)
	if err != nil || len(layers) == 0 {
		return why
	}
	if errors.Is(why, errBlank) {
		why = errors.New("lease: it is not there")
	}
	d.tellLost(d.dir, why)
	return why
}

// tellLost tells, once, that all of the device's images, which were in dir, are lost.
func (d *Device) tellLost(dir string, why error) {
	if d.toldLost {
		return
	}
	d.toldLost = true
	d.cfg.Log.Error("images lost", "file", dir, "err", why)
	d.event(EventSnapshotFailed, "", fmt.Sprintf("its images are lost: %v; destroy the snapshots", why))
}

// wipe forgets what is in the run directory.
func (d *Device) wipe() error {
	err := d.forgetFound()
	if err != nil || d.dir == "" {
		return err
	}
	if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	return os.MkdirAll(d.dir, 0o700)
}

// forgetFound forgets what was found until now, which closes its files. Snapshots lack the
// images from then on.
func (d *Device) forgetFound() error {
	mine := func(i *Image) bool { return i.device == d }
	for _, s := range d.cat.found {
		n := len(s.images)
		s.images = slices.DeleteFunc(s.images, mine)
		s.lost += n - len(s.images)
	}
	var errs []error
	for _, i := range d.images {
		if i.overlay != nil {
			errs = append(errs, i.overlay.table.close())
		}
	}
	errs = append(errs, d.closeTables(), d.register.close())
	d.images, d.register, d.nextLayer = nil, nil, 0
	d.tracked.Store(nil)
	d.rollback.Store(nil)
	d.limits.Store(0)
	return errors.Join(errs...)
}
