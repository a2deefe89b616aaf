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
	if d.stateDir != "" {
		d.running.Add(1)
		go d.keepDurable()
		if d.durable.Load() == nil {
			d.poke()
		}
	}
	return d, nil
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
	d.size.Store(o.size)
	d.leaseTimer = time.AfterFunc(time.Hour, d.tendLease)
	d.leaseTimer.Stop()
	d.flusher = newFlusher(d.file.sync)
	d.copier = newCopier(pool)
	d.flights.New = func() any { return newFlight(d) }
	d.settled = sync.NewCond(&d.mu)
	if d.dir != "" {
		if err := os.MkdirAll(d.dir, 0o700); err != nil {
			return nil, err
		}
	}
	lost, err := d.find()
	if err != nil {
		return nil, err
	}
	if _, d.counts = d.file.written(); d.counts {
		d.tallying.Do(d.tally) // a disk that was spun down takes seconds
	}
	d.endFound()
	if lost != nil {
		d.noteGeneration(lost.Error())
	}
	if err := d.tellOthers(); err != nil {
		return nil, fmt.Errorf("note that its origin has another name now: %w", err)
	}
	if d.register == nil {
		if d.register, err = newRegister(d.path(registerName)); err != nil {
			return nil, err
		}
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

// errNew is why a device without state begins a generation.
var errNew = errors.New("the device is new")

// find opens the device's state, or begins anew. lost says why a new generation
// has begun, nil if none has.
func (d *Device) find() (lost, err error) {
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
		behind = cmp.Or(servedAs(mem), d.writtenSince(mem))
	}
	if mem != nil {
		err = mem.Close()
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
		if err := d.reopenDurable(); err != nil {
			d.cfg.Log.Warn("the record of writes begins anew", "err", err)
		}
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
		if err := d.newChanges(); err != nil {
			return nil, err
		}
	}
	mem, _, _, why := d.openLease()
	if mem == nil {
		return nil, why
	}
	return lost, d.beginLease(mem)
}

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
	d.cfg.Log.Error("images lost", "file", d.dir, "err", why)
	d.event(EventSnapshotFailed, "", fmt.Sprintf("its images are lost: %v; destroy the snapshots", why))
	return why
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
