// Opening everything that a daemon stands on, from the inside out.

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"blksnap/cow"
	"blksnap/fusefs"
	"blksnap/store"
)

// open opens everything, from the inside out. Nobody is served yet.
func (s *service) open(ctx context.Context, passed []net.Listener) error {
	if s.set.private != "" {
		s.later(func() error { return os.RemoveAll(s.set.private) })
	}
	if err := s.set.makeDirs(ctx); err != nil {
		return err
	}
	if err := s.lock(ctx); err != nil {
		return err
	}
	s.beginTree()
	if err := s.openState(ctx); err != nil {
		return err
	}
	cat, why, err := cow.OpenCatalogue(s.set.run, s.set.state)
	if err != nil {
		return err
	}
	s.later(cat.Close)
	if why != nil {
		s.log.Error("snapshots of the daemon before are lost", "err", why)
	}
	left, err := s.membersLeft(cat)
	if err != nil {
		return err
	}
	pool := store.NewPool()
	s.later(func() error { return within(closeLimit, "close the snapstore", pool.Close) })
	if err := s.openStores(ctx, pool, &left); err != nil {
		return err
	}
	s.daemon = newDaemon(s.version, s.log, cat, pool, func(export string) string {
		return exportURI(s.nbdOn[0].Addr(), export, !s.plaintext(s.nbdOn[0]))
	})
	s.tellLost()
	if err := s.listen(ctx, passed); err != nil {
		return err
	}
	s.runOnLow() // before a snapstore is found full
	s.later(s.daemon.awaitRollbacks)
	s.later(s.daemon.closeDevices) // which ends them
	if err := s.openDevices(ctx, left); err != nil {
		return err
	}
	if err := s.show(ctx); err != nil {
		return err
	}
	s.discard()
	s.daemon.setDirs(s.set.mount, s.dirs()...)
	s.daemon.keepMembers(s.set.run, left)
	s.daemon.resumeRollbacks()
	return nil
}

// show mounts the tree and finds the snapshots of a predecessor, which gives up what
// cannot be found. So that is last: a start that fails, perhaps because it was told
// of the wrong stores and devices, must not cost any snapshot. Until then the tree
// is mounted but shows nothing.
func (s *service) show(ctx context.Context) error {
	defer close(s.daemon.complete)
	if err := s.mountTree(ctx); err != nil {
		return err
	}
	return s.daemon.recoverSnapshots()
}

// membersLeft is what the set file says. Without it nobody knows which part a
// slot's number means: then the snapshots of the daemon before are given up.
func (s *service) membersLeft(cat *cow.Catalogue) (members, error) {
	left, why := readMembers(s.set.run, cat.Boot())
	if why == nil {
		return left, nil
	}
	lost, err := cat.Forget()
	if err != nil {
		return members{}, err
	}
	if lost > 0 || !errors.Is(why, fs.ErrNotExist) {
		s.log.Error("snapshots of the daemon before, and what was added while it ran, are lost", "snapshots", lost, "err", why)
	}
	return members{Boot: cat.Boot()}, nil
}

// openDevices opens the devices that were asked for, and those that were added
// while a predecessor ran.
func (s *service) openDevices(ctx context.Context, left members) error {
	for _, q := range s.set.devices {
		if _, err := s.daemon.addDevice(ctx, q, false); err != nil {
			return err
		}
	}
	for _, q := range left.addedDevices(s.set.devices) {
		if _, err := s.daemon.addDevice(ctx, q, true); err != nil {
			s.log.Error("a device of the daemon before is not back", "device", q.Name, "err", err)
		}
	}
	return nil
}

// discard gives what nobody names any more back to the file system; meanwhile other
// slots are given out.
func (s *service) discard() {
	discarded := make(chan error, 1)
	go func() { discarded <- s.daemon.pool.Discard() }()
	s.later(func() error {
		return within(closeLimit, "empty the snapstore", func() error { return <-discarded })
	})
}

// openStores opens the parts of the snapstore, with what a predecessor kept in
// them, and notes their numbers in left and in the set file. A start that fails
// after that takes the files away that it has made.
func (s *service) openStores(ctx context.Context, pool *store.Pool, left *members) error {
	added := left.addedParts(s.set.stores)
	for _, spec := range s.set.stores {
		err := s.openGiven(ctx, pool, left, spec)
		if err != nil && !s.leaveOut(spec, err) {
			return err
		}
	}
	for _, spec := range added {
		if err := openStore(ctx, pool, left, spec, false, true); err != nil {
			s.log.Error("a part of the snapstore is not back", "part", spec, "err", err)
		}
	}
	for _, p := range left.absent() {
		s.log.Warn("a part of the snapstore is not there any more", "part", p.Spec, "number", p.No)
	}
	if !left.news {
		return nil // so that what has run before starts on a full file system, too
	}
	// A successor has to know a part's number before a slot is named by it.
	if err := left.write(s.set.run); err != nil {
		return fmt.Errorf("note the parts of the snapstore: %w", err)
	}
	return nil
}

// openGiven opens a part that was asked for. It refuses one that is an origin, or stands on
// what we are about to serve.
func (s *service) openGiven(ctx context.Context, pool *store.Pool, left *members, spec store.Spec) error {
	made := false
	if spec.Path != "" { // not memory
		if s.stateless != nil && s.inState(spec) {
			return s.stateless
		}
		err := prompt("snapstore", spec.Path, func() error {
			_, err := os.Lstat(spec.Path)
			made = spec.Kind == store.File && errors.Is(err, fs.ErrNotExist)
			return s.set.checkOrigins(spec)
		})
		if err == nil {
			err = checkGround(ctx, "snapstore", spec.Path, probeRead)
		}
		if err != nil {
			return err
		}
	}
	if err := openStore(ctx, pool, left, spec, s.set.force, false); err != nil {
		return err
	}
	if made {
		s.later(func() error { return s.unmake(spec.Path) })
	}
	return nil
}

// openStore opens a part of the snapstore. The error is errHangs where its disk does not
// answer: then the part is closed when it does.
func openStore(ctx context.Context, pool *store.Pool, left *members, spec store.Spec, force, added bool) error {
	part, err := afterEnd(ctx, spec.Path, func() (store.Part, error) {
		return promptly(answerWait, "snapstore "+spec.String(), func() (store.Part, error) { return store.Open(spec, force) },
			func(p store.Part) { p.Close() })
	})
	if err != nil {
		return err
	}
	no, err := left.claim(part, added)
	if err == nil {
		err = pool.AddAs(no, part)
	}
	if err != nil {
		return errors.Join(err, part.Close())
	}
	return nil
}

// unmake removes a file that this start has made, unless the daemon has served.
func (s *service) unmake(path string) error {
	if s.served {
		return nil
	}
	return os.Remove(path)
}

// lock locks the run directory.
func (s *service) lock(ctx context.Context) error {
	s.freeKilled(ctx, s.set.run)
	l, err := lockDir(ctx, s.set.run, s.set.control, stopWait)
	if err != nil {
		return err
	}
	s.later(func() error { return s.release(l) })
	return nil
}

// release gives the lock of a directory back. Where something hangs at the end it stays until
// the process is gone: so that the next start waits for that, instead of meeting an origin
// that is still locked.
func (s *service) release(l *dirLock) error {
	if s.hangs {
		return l.keep()
	}
	return within(answerLimit, "unlock a directory", l.unlock)
}

// listen opens the sockets. Clients that connect already wait until we serve.
func (s *service) listen(ctx context.Context, passed []net.Listener) error {
	var err error
	if s.apiOn, err = listenUnix(ctx, s.set.control); err != nil {
		return err
	}
	s.later(closeOnce(s.apiOn))
	if s.nbdOn = passed; passed != nil {
		return s.checkPassed()
	}
	for _, uri := range s.set.listen {
		l, err := listenNBD(ctx, uri, s.set.tls != nil || s.set.allowPlaintext)
		if err != nil {
			return err
		}
		s.nbdOn = append(s.nbdOn, l)
		s.later(closeOnce(l))
	}
	return nil
}

// checkPassed refuses to serve other machines without TLS unless told to.
func (s *service) checkPassed() error {
	for _, l := range s.nbdOn {
		if s.set.tls == nil && !s.plaintext(l) {
			return errPlaintext(l.Addr().String())
		}
	}
	return nil
}

// closeOnce closes l, which its server may have closed before.
func closeOnce(l net.Listener) func() error {
	return func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// beginTree makes the tree's thread, before anything is opened on a disk that may hang.
func (s *service) beginTree() {
	if s.set.mount == "" {
		return
	}
	s.thread = fusefs.NewThread()
	s.later(func() error { return within(closeLimit, "end the tree", func() error { s.thread.End(); return nil }) })
}

func (s *service) mountTree(ctx context.Context) (err error) {
	if s.set.mount == "" {
		return nil
	}
	s.tree, err = fusefs.Mount(ctx, treeSource{s.daemon}, fusefs.Options{
		Dir:        s.set.mount,
		Create:     s.set.mountDefault || inBackground(),
		AllowOther: s.set.allowOther,
		Thread:     s.thread,
		Log:        s.log,
	})
	if err != nil {
		return err
	}
	s.daemon.setTree(s.tree)
	s.later(func() error {
		// ctx has ended: that is why the tree goes.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountLimit)
		defer cancel()
		return s.unmount(ctx)
	})
	return nil
}

// unmount unmounts the tree. Files of it that somebody keeps open, perhaps in
// another mount namespace, end with our process: that is worth a line in the
// log, a tree that stays mounted is an error.
func (s *service) unmount(ctx context.Context) error {
	err := s.tree.Unmount(ctx)
	if err == nil {
		return nil
	}
	if m, merr := mountOf(s.set.mount); merr != nil || m.kind == "fuse.blksnap" {
		return err
	}
	s.log.Warn("the tree was in use", "err", err)
	return nil
}
